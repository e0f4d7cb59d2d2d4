"""What diversity prompts are filled with. The words are ours; only names of styles and object classes are taken over.

The keyword files of DivGenBench are not released. Counts are the paper's: 3 ages, 6 ethnicities, 2 genders, 40 facial
features; 27 styles (the classes of WikiArt); 80 object classes (those of COCO) and 4 counts; 18 tones on 3 axes.
"""

from __future__ import annotations

__all__ = ["BASE_PROMPTS", "CONFLICTS", "KEYWORDS", "pluralise", "with_article"]

KEYWORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "identity": {
        "age": ("young", "middle-aged", "elderly"),
        "ethnicity": ("East Asian", "South Asian", "Black", "White", "Hispanic", "Middle Eastern"),
        "gender": ("man", "woman"),
        "feature": (
            "arched eyebrows", "bushy eyebrows", "thin eyebrows", "bags under the eyes", "narrow eyes", "large eyes",
            "deep-set eyes", "a big nose", "a pointed nose", "a button nose", "full lips", "thin lips",
            "high cheekbones", "rosy cheeks", "a double chin", "a cleft chin", "a square jaw", "an oval face",
            "a round face", "freckles", "dimples", "deep wrinkles", "a gap between the front teeth", "a broad smile",
            "a slightly open mouth", "bangs", "straight hair", "wavy hair", "curly hair", "gray hair",
            "a receding hairline", "a bald head", "eyeglasses", "earrings", "a hat", "a goatee", "a mustache",
            "sideburns", "a full beard", "heavy makeup",
        ),
    },
    "style": {
        "style": (
            "Abstract Expressionism", "Action Painting", "Analytical Cubism", "Art Nouveau", "Baroque",
            "Color Field Painting", "Contemporary Realism", "Cubism", "Early Renaissance", "Expressionism", "Fauvism",
            "High Renaissance", "Impressionism", "Mannerism", "Minimalism", "Naive Art", "New Realism",
            "Northern Renaissance", "Pointillism", "Pop Art", "Post-Impressionism", "Realism", "Rococo", "Romanticism",
            "Symbolism", "Synthetic Cubism", "Ukiyo-e",
        ),
    },
    "layout": {
        "object": (
            "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
            "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
            "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
            "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
            "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
            "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
            "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
            "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
            "teddy bear", "hair drier", "toothbrush",
        ),
        "count": ("two", "three", "four", "five"),
    },
    "tonal": {
        "saturation": (
            "in vivid colors", "in highly saturated colors", "in neon colors", "in muted colors",
            "in faded pastel colors", "in nearly monochrome colors",
        ),
        "contrast": (
            "with high contrast", "with hard shadows", "with a stark silhouette", "with low contrast",
            "in soft flat light", "in a pale haze",
        ),
        "brightness": (
            "brightly lit", "in dazzling sunlight", "in a high-key exposure", "dimly lit", "in near darkness",
            "in a low-key exposure",
        ),
    },
}  # fmt: skip

# What one portrait cannot show: words of one axis with words of another. The benchmark's own filter is not released.
CONFLICTS: tuple[tuple[tuple[str, frozenset[str]], tuple[str, frozenset[str]]], ...] = (
    (("gender", frozenset({"woman"})), ("feature", frozenset({"a goatee", "a mustache", "sideburns", "a full beard"}))),
    (("age", frozenset({"young"})), ("feature", frozenset({"gray hair", "deep wrinkles"}))),
)

BASE_PROMPTS: tuple[str, ...] = (
    "a harbor with fishing boats", "a village street after rain", "a child flying a kite", "a bowl of ripe pears",
    "a cat asleep on a windowsill", "a lighthouse on a cliff", "two dancers in an empty hall", "a crowded market",
    "a horse in a meadow", "a train crossing a bridge", "an old man reading a newspaper", "a vase of wildflowers",
    "a mountain lake at dawn", "a baker at the oven", "a narrow canal between houses", "an owl on a branch",
    "a violin on a wooden chair", "a woman at a writing desk", "a snowy forest path", "a windmill among fields",
    "a chess game in a park", "a fox crossing a road", "a ship in a storm", "a kitchen table set for breakfast",
    "a blacksmith at work", "a field of sunflowers", "a bicycle against a brick wall", "a family on a beach",
    "a waterfall in a gorge", "a street musician with an accordion", "a stone bridge over a river",
    "a greenhouse full of plants", "a rooster on a fence", "a library with tall shelves", "a carnival at night",
    "a shepherd with a flock", "a city skyline seen from a hill", "a sailor mending a net", "a teapot and two cups",
    "a garden with a fountain", "a dog waiting at a door", "a desert with distant mesas", "a girl picking apples",
    "a railway station clock", "an orchestra on a stage", "a cabin beside a frozen pond", "a hot air balloon",
    "a lantern in a dark alley",
)  # fmt: skip

_PLURALS = {
    "person": "people", "sheep": "sheep", "tie": "neckties", "skis": "pairs of skis", "knife": "knives",
    "broccoli": "heads of broccoli", "tv": "televisions", "mouse": "computer mice", "remote": "remote controls",
    "scissors": "pairs of scissors",
}  # fmt: skip


def pluralise(name: str) -> str:
    """The English plural of an object class, as a picture's description has it."""
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in tuple("aeiou"):
        return f"{name[:-1]}ies"
    return f"{name}s"


def with_article(words: str) -> str:
    """Words behind "a" or "an", by their first letter."""
    return f"{'an' if words[:1].lower() in tuple('aeiou') else 'a'} {words}"
