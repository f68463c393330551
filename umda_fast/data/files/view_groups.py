"""Which files of bags make one view, and how views and bags are called.

Files of one encoder, width and tiling are one view wherever they lie. What no file says, the folders do: those with
different slides, or with slides of one name and patches elsewhere, are one view, which sites or patients share; those
whose patches lie on top of each other are views of the same slides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from umda_fast.data.files.bag_file import BagFile
from umda_fast.data.files.layouts import Folder

Together = Callable[[BagFile, BagFile], float | None]
"""How much of one file's patches lies on those of another, 0 to 1; None where that cannot be known."""

_TRIED = 5  # slides that two folders have in common
_PERHAPS = 0.5  # share of patches from which folders are views of one slide
_SURELY = 0.95  # and where they have one encoder: sites share one more often than views do


@dataclass(frozen=True)
class Group:
    """Files that lie in one folder and say the same.

    Attributes:
        parts: as of `Folder`.
        encoder, tiling, width: what all files say, if any does.
        files: stem -> file.
    """

    parts: tuple[str, ...]
    encoder: str | None
    tiling: str | None
    width: int | None
    files: dict[str, BagFile]


Place = tuple[tuple[str, ...], BagFile]
"""A file and the folders it lies in."""


@dataclass
class View:
    """Groups that are one view; `stems`: of every stem the files, and where they lie."""

    groups: list[Group] = field(default_factory=list)
    stems: dict[str, list[Place]] = field(default_factory=dict)

    def add(self, group: Group) -> None:
        self.groups.append(group)
        for stem, file in group.files.items():
            self.stems.setdefault(stem, []).append((group.parts, file))

    def takes(self, group: Group) -> bool:
        """Whether a group says the same."""
        widths = {member.width for member in self.groups} | {group.width}
        first = self.groups[0]
        return (first.encoder, first.tiling) == (group.encoder, group.tiling) and len(widths - {None}) < 2


def groups_of(folder: Folder, files: dict[str, BagFile]) -> list[Group]:
    """The files of one folder, apart by what they say; one that does not say it goes with the most."""
    encoders = Counter(file.encoder for file in files.values() if file.encoder).most_common(1)
    tilings = Counter(file.tiling for file in files.values() if file.tiling).most_common(1)
    encoder, tiling = encoders[0][0] if encoders else None, tilings[0][0] if tilings else folder.tiling
    apart: dict[tuple[str | None, str | None], dict[str, BagFile]] = {}
    for stem, file in files.items():
        apart.setdefault((file.encoder or encoder, file.tiling or tiling), {})[stem] = file
    found = []
    for said, members in apart.items():
        widths = Counter(file.width for file in members.values() if file.width is not None).most_common(1)
        found.append(Group(folder.parts, *said, widths[0][0] if widths else None, members))
    return found


def views_of(groups: Iterable[Group], together: Together) -> list[View]:
    """The groups that are one view, in the order of their first."""
    views: list[View] = []
    for group in groups:
        # Those of the same folder first, then those of a folder of the same name, as site_b/uni after site_a/uni.
        alike = sorted((view for view in views if view.takes(group)), key=lambda view: -_closeness(view, group))
        view = next((view for view in alike if not _on_top(view, group, together)), None)
        if view is None:
            view = View()
            views.append(view)
        view.add(group)
    return views


def _closeness(view: View, group: Group) -> int:
    if any(member.parts[:1] == group.parts[:1] for member in view.groups):
        return 2
    return int(any(member.parts[-1:] == group.parts[-1:] for member in view.groups))


def _on_top(view: View, group: Group, together: Together) -> bool:
    """Whether slides of the same names are the same slides: then the group is another view of them."""
    common = [stem for stem in group.files if stem in view.stems]
    least = _PERHAPS if group.encoder is None else _SURELY
    votes = []
    for stem in common[:: max(1, len(common) // _TRIED)][:_TRIED]:
        shares = [together(other, group.files[stem]) for _, other in view.stems[stem][:_TRIED]]
        votes.append(any(share is None or share >= least for share in shares))
    return 2 * sum(votes) > len(votes)


def view_names(views: Sequence[View]) -> list[str]:
    """Views called after their encoders where every view says which; where one encoder has several kinds of patches,
    after both; else after their folders, `features` where all folders are one view."""
    encoders = [_said(view, lambda file: file.encoder) for view in views]
    if all(encoders):
        counts = Counter(encoders)
        tilings = [_said(view, lambda file: file.tiling) or view.groups[0].tiling for view in views]
        names = [
            str(encoder) if counts[encoder] == 1 or not tiling else f"{encoder}_{tiling}"
            for encoder, tiling in zip(encoders, tilings, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    tops = Counter(top for view in views for top in {group.parts[:1] for group in view.groups})
    folders = [_folder_name(view, shared=max(tops.values()) > 1, alone=len(views) == 1) for view in views]
    for names in ([re.sub(r"^(patch_)?features_(?=.)", "", name) for name in folders], folders):
        if len(set(names)) == len(names):
            return names
    return ["/".join(view.groups[0].parts) + f"_{view.groups[0].tiling or number}" for number, view in enumerate(views)]


def _said(view: View, what: Callable[[BagFile], str | None]) -> str | None:
    found = Counter(
        text for group in view.groups for file in group.files.values() if (text := what(file))
    ).most_common(1)
    return found[0][0] if found else None


def _folder_name(view: View, shared: bool, alone: bool) -> str:
    """The folder of a view, at the top; or the one at the bottom, where those at the top are `shared` with others."""
    paths = [group.parts for group in view.groups if group.parts]
    tops, leaves = dict.fromkeys(path[0] for path in paths), dict.fromkeys(path[-1] for path in paths)
    for names in (leaves, tops) if shared else (tops, leaves):
        if len(names) == 1 and (len(paths) == 1 or not alone or names is tops):
            return next(iter(names))
    return "features" if alone or not paths else "+".join(tops)


def bag_names(views: Sequence[View]) -> list[dict[str, list[BagFile]]]:
    """The files of every view by the name of their bag: the stem, after the folders that tell it apart where a view has
    several files of one stem. More than one file of a name: these do not."""
    apart: dict[str, list[str]] = {}
    for view in views:
        for stem, places in view.stems.items():
            if len(places) > 1 and len(places) > len(apart.get(stem, ())):
                apart[stem] = _prefixes([parts for parts, _ in places])
    named: list[dict[str, list[BagFile]]] = []
    for view in views:
        named.append({})
        for stem, places in view.stems.items():
            for parts, file in places:
                mine = [prefix for prefix in apart.get(stem, ()) if set(prefix.split("/")) <= set(parts)]
                prefix = max(mine, key=len, default="")
                named[-1].setdefault(f"{prefix}/{stem}" if prefix else stem, []).append(file)
    return named


def _prefixes(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """What of some different paths tells them apart: without the folders at both ends that all have."""
    start = next(
        (depth for depth in range(min(map(len, paths))) if len({path[depth] for path in paths}) > 1),
        min(map(len, paths)),
    )
    rest = [path[start:] for path in paths]
    while all(len(path) > 1 for path in rest) and len({path[-1] for path in rest}) == 1:
        rest = [path[:-1] for path in rest]
    return ["/".join(path) for path in rest]
