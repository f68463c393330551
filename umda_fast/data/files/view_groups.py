"""Which files of bags make one view, and how views and bags are called.

Files of one encoder, width and tiling are one view wherever they lie. What no file says, the folders do: those with
different slides, or with slides of one name and patches elsewhere, are one view, which sites or patients share; those
whose patches lie on top of each other are views of the same slides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

from umda_fast.data.files.bag_file import BagFile
from umda_fast.data.files.layouts import Folder

Together = Callable[[BagFile, BagFile], float | None]
"""How much of one file's patches lies on those of another, 0 to 1; None where that cannot be known."""

_FOLDERS = 3  # from how many on they may be of slides, with views in them
_TRIED = 5  # slides that two folders have in common
_PERHAPS = 0.5  # share of patches from which folders are views of one slide
_SURELY = 0.95  # and where they have one encoder: sites share one more often than views do


FolderOfBags = tuple[Folder, dict[str, BagFile]]
"""A folder and the files in it that can be read, by their stems."""


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


def turned(folders: Sequence[FolderOfBags], together: Together) -> tuple[list[FolderOfBags], bool]:
    """Folders of which each is a slide, and its files are views (`S1/uni.h5`, `S1/conch.h5`, `S2/uni.h5`, ...), as
    folders of views with slides in them; and whether they are that.

    They are where at least half of the folders, which are more than the names in them, have each of these names; where
    files of one name are of one encoder and width, and of different slides; and where files of two names are not, or
    lie on top of each other.
    """
    names = Counter(stem for _, files in folders for stem in files)
    if len(folders) < _FOLDERS or not 0 < len(names) < len(folders) or 2 * min(names.values()) < len(folders):
        return list(folders), False
    columns = {name: [files[name] for _, files in folders if name in files] for name in names}
    pairs = [
        (one, other, [files for _, files in folders if {one, other} <= files.keys()])
        for one, other in combinations(names, 2)
    ]
    if not all(_are_slides(files, together) for files in columns.values()) or not all(
        _kinds(columns[one]).isdisjoint(_kinds(columns[other]))
        or _most(_on_each_other(files[one], files[other], together) for files in slides[:_TRIED])
        for one, other, slides in pairs
    ):
        return list(folders), False
    found: dict[tuple[str, ...], FolderOfBags] = {}
    for folder, files in folders:
        for stem, file in files.items():
            parts = (*folder.parts[:-1], stem)
            _, members = found.setdefault(parts, (replace(folder, parts=parts, files=[]), {}))
            members[folder.parts[-1]] = file
    return list(found.values()), True


def _kinds(files: Sequence[BagFile]) -> set[tuple[str | None, int | None]]:
    return {(file.encoder, file.width) for file in files if file.rows}


def _are_slides(files: Sequence[BagFile], together: Together) -> bool:
    """Whether files of one name in different folders are of different slides."""
    pairs = list(pairwise(files))[:_TRIED]
    return len(_kinds(files)) < 2 and not _most(_on_each_other(one, other, together) for one, other in pairs)


def _on_each_other(one: BagFile, other: BagFile, together: Together) -> bool:
    """Whether two files are of the same patches; without coordinates, of as many."""
    share = together(one, other)
    return one.rows == other.rows if share is None else share >= _PERHAPS


def _most(votes: Iterable[bool]) -> bool:
    cast = list(votes)
    return 2 * sum(cast) > len(cast)


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
    return _most(votes)


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
    short = [re.sub(r"^(patch_|slide_)?features_(?=.)", "", name) for name in folders]
    tiled = [f"{name}_{view.groups[0].tiling}" for name, view in zip(short, views, strict=True)]
    for names in (short, folders, tiled):
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(view.groups[0].parts)}_{number}" for number, view in enumerate(views)]


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
