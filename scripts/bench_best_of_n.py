"""What early rejection saves in best-of-N, and what it costs: by when the worst are dropped, as a Markdown table.

    python scripts/bench_best_of_n.py                            the tiny SDXL, an encoder's cosine and JPEG size
    python scripts/drawing_generator.py DRAWINGS                 a trained miniature, then:
    python scripts/bench_best_of_n.py --model DRAWINGS --prompts DRAWINGS/concepts.txt --device cpu
    python scripts/bench_best_of_n.py --model MODEL --device cuda --rewards pickscore hps-v2.1 --prompts my-prompts.txt

For each prompt all N images are drawn to the end, with a score at each check, so that the correlation of early and
final scores is over all N and not over survivors alone; from these scores follows which image each check would have
kept. At the default check `best_of_n` is then run as it is used, its denoiser calls are counted, and its choice is
compared. Means over prompts:

- saved: share of the denoiser's calls, against finishing all N. Decoding and scoring at the check are not in it.
- Spearman: of early and final scores, all N.
- regret: best final score of all N minus that of the image kept, in standard deviations of the N final scores.
- best kept: how often these are the same image.
- fewer seeds: what as many denoiser calls bring without any check, on fewer than N images; what a check has to beat.

The tiny model has random weights. Its pictures mean nothing, so that the table shows what is saved, and that early
scores foresee final ones as far as sampling itself allows; how well a trained model's do has to be measured with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = ROOT / "tests" / "data" / "photos" / "captions.jsonl"
DEFAULT_CHECK = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny:sdxl")
    parser.add_argument("--rewards", nargs="+", default=["cosine:bundled", "jpeg-incompressibility"])
    parser.add_argument("--prompts", type=Path, help="one a line, or .jsonl (default: captions of photographs)")
    parser.add_argument("--count", type=int, default=8, help="prompts to use")
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("--survivors", type=int, help="a quarter of N by default")
    parser.add_argument("--checks", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.7])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--fit", type=int, default=16, help="prompts to fit a latent scorer to; 0 leaves it out")
    arguments = parser.parse_args()
    bench(arguments)


@dataclass
class Scores:
    """Of one prompt's N images: early ones a column a check, final ones, and seeds."""

    early: np.ndarray
    final: np.ndarray
    seeds: list[int]

    def kept(self, check: int, survivors: int) -> int:
        """Place of the image that is kept when the best `survivors` at a check go on."""
        order = np.lexsort((np.arange(len(self.final)), -self.early[:, check]))[:survivors]
        return min(order, key=lambda place: (-self.final[place], place))


def bench(arguments: argparse.Namespace) -> None:
    from generation import load_pipeline
    from generation.latent_scorer import fit_latent_scorer
    from generation.prompts import read_prompts
    from generation.rewards import load_rewards

    texts = read_prompts(arguments.prompts or CAPTIONS)
    prompts, others = texts[: arguments.count], texts[arguments.count : arguments.count + arguments.fit]
    pipeline = load_pipeline(arguments.model, device=arguments.device)
    survivors = arguments.survivors or -(-arguments.n // 4)
    checks = sorted({*arguments.checks, DEFAULT_CHECK})
    place = checks.index(DEFAULT_CHECK)
    print(
        f"{arguments.model}, N = {arguments.n}, {survivors} finished, 1 kept, {arguments.steps} steps, "
        f"{len(prompts)} prompts\n"
    )
    for name in arguments.rewards:
        reward = load_rewards(name, device=arguments.device)
        full = [full_run(pipeline, prompt, reward, checks, arguments) for prompt in prompts]
        print(f"**{name}**\n")
        print(
            "| check_at | early score | saved | Spearman, all N | regret, std | best kept | fewer seeds: regret, kept |"
        )
        print("|---|---|---|---|---|---|---|")
        for column, check in enumerate(checks):
            print(row(f"{check:g}", "decoded estimate", saving(check, survivors, arguments), full, column, survivors))
        half = [full_run(pipeline, prompt, reward, [DEFAULT_CHECK], arguments, preview_scale=2) for prompt in prompts]
        saved = saving(DEFAULT_CHECK, survivors, arguments)
        print(row(f"{DEFAULT_CHECK:g}", "decoded at half size", saved, half, 0, survivors))
        if others:
            scorer = fit_latent_scorer(
                pipeline,
                reward,
                others,
                check_at=DEFAULT_CHECK,
                images_per_prompt=arguments.n,
                steps=arguments.steps,
                seed=arguments.seed + 100_000,
                batch_size=arguments.batch_size,
            )
            learnt = [full_run(pipeline, p, reward, [DEFAULT_CHECK], arguments, scorer=scorer) for p in prompts]
            about = f"latent scorer of {scorer.images} images"
            print(row(f"{DEFAULT_CHECK:g}", about, saved, learnt, 0, survivors))
        print(f"\n{as_used(pipeline, prompts, reward, full, place, survivors, arguments)}\n", flush=True)


def full_run(
    pipeline: Any, prompt: str, reward: Any, checks: Sequence[float], arguments: argparse.Namespace, **options: Any
) -> Scores:
    """Scores at all checks with nothing dropped."""
    from generation.best_of_n import best_of_n

    found = best_of_n(
        prompt,
        reward=reward,
        n=arguments.n,
        model=pipeline,
        check_at=checks,
        survivors=[arguments.n] * len(checks),
        steps=arguments.steps,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        **options,
    )
    assert found.saved == 0
    early = np.array([one.early for one in found.candidates])
    return Scores(early, np.array([one.score for one in found.candidates]), [one.seed for one in found.candidates])


def saving(check: float, survivors: int, arguments: argparse.Namespace) -> float:
    """Share of the denoiser's calls, where the scheduler takes as many steps as asked for."""
    share = min(max(round(check * arguments.steps), 1), arguments.steps - 1) / arguments.steps
    return (1 - share) * (1 - survivors / arguments.n)


def row(check: str, early: str, saved: float, runs: Sequence[Scores], column: int, survivors: int) -> str:
    """A line of the table."""
    from scipy.stats import spearmanr

    correlations, regrets, hits = [], [], []
    for scores in runs:
        kept = scores.final[scores.kept(column, survivors)]
        correlations.append(float(spearmanr(scores.early[:, column], scores.final).statistic))
        regrets.append((scores.final.max() - kept) / scores.final.std())
        hits.append(kept == scores.final.max())
    regret, hit = np.mean([fewer_seeds(scores.final, 1 - saved) for scores in runs], axis=0)
    cells = [check, early, f"{saved:.1%}", f"{np.mean(correlations):.3f}", f"{np.mean(regrets):.3f}"]
    cells += [f"{np.mean(hits):.0%}", f"{regret:.3f}, {hit:.0%}"]
    return f"| {' | '.join(cells)} |"


def fewer_seeds(final: np.ndarray, share: float) -> np.ndarray:
    """Expected regret of the best of a share of the images, and how often it is the best of all.

    The place r of the best of k out of n, from 0, has the probability C(n - r - 1, k - 1) / C(n, k). Between whole
    numbers k it is interpolated.
    """
    n, wanted = len(final), share * len(final)
    below = (final.max() - np.sort(final)[::-1]) / final.std()

    def of(count: int) -> np.ndarray:
        chances = np.array([comb(n - place - 1, count - 1) / comb(n, count) for place in range(n)])
        return np.array([chances @ below, chances[0]])

    whole = max(int(wanted), 1)
    return of(whole) + (wanted - whole) * (of(min(whole + 1, n)) - of(whole))


def as_used(
    pipeline: Any,
    prompts: Sequence[str],
    reward: Any,
    full: Sequence[Scores],
    place: int,
    survivors: int,
    arguments: argparse.Namespace,
) -> str:
    """Run `best_of_n` with the default check and count."""
    from generation.best_of_n import best_of_n

    calls = plain = same = 0
    regrets = []
    for prompt, scores in zip(prompts, full, strict=True):
        found = best_of_n(
            prompt,
            reward=reward,
            n=arguments.n,
            model=pipeline,
            survivors=survivors,
            steps=arguments.steps,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
        )
        calls, plain = calls + found.calls, plain + found.plain_calls
        kept = scores.seeds.index(found.images[0].seed)
        same += kept == scores.kept(place, survivors)
        regrets.append((scores.final.max() - scores.final[kept]) / scores.final.std())
    return (
        f"As used, check_at {DEFAULT_CHECK:g}: {calls:,} denoiser calls instead of {plain:,}, {1 - calls / plain:.1%} "
        f"saved, regret {np.mean(regrets):.3f} std; the image that the table's scores name was kept for {same} of "
        f"{len(prompts)} prompts (near ties turn with the rounding of another batch size)."
    )


if __name__ == "__main__":
    main()
