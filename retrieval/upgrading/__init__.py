"""Another encoder for an index that stays searchable on the way: measured first, bridged, embedded by priority.

The manifest's entry `upgrade` (`part.new_entry`) holds a second partition beside the old one, which is not touched.
Reading: `live` answers from both, `bridge` brings new queries to old vectors. Writing: `sampling` and `measuring` make
the report, `embedding` embeds without a lock, `checking` chooses what searches may use, `switching` ends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .report import KindReport, UpgradeReport
    from .support import Support, read_support
    from .upgrade import IndexUpgrade, UpgradeStatus

# When first used: `draft` and `snapshot` import parts of this package, which imports them.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "report": ["KindReport", "UpgradeReport"],
        "support": ["Support", "read_support"],
        "upgrade": ["IndexUpgrade", "UpgradeStatus"],
    },
)
