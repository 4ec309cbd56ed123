"""What names tell: which file is a label map, of which image, and which scans are of one case and one subject.

Nothing here opens a file. Names are compared by their words, the parts between ``_``, ``-``, ``.`` and blanks.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import PurePosixPath

from logonet.core.errors import UserError
from logonet.data import volume
from logonet.data.manifest import Source, stem

LABEL_FOLDER = re.compile(
    r"(labels?|masks?|segs?|segmentations?|annotations?|gt|ground_?truths?|manual)_?(tr|ts|va|val)?"
)
LABELS_ROOT = re.compile(r"labels?(tr|ts|va|val)?")
MASK_FOLDER = re.compile(r"(segmentations?|segs?|masks?)")  # of one mask for each class
IMAGE_FOLDER = re.compile(r"(images?|imgs?|imaging|scans?|volumes?|data)_?(tr|ts|va|val)?")
# First or last in a name, also with a number behind: label003, segmentation-17, case_seg.
LABEL_WORDS = {
    "label", "labels", "lbl", "seg", "segm", "dseg", "segmentation", "segmentations", "mask", "masks", "msk", "gt",
    "groundtruth", "truth", "annotation", "annotations", "aseg", "roi", "rois",
}  # fmt: skip
IMAGE_WORDS = {"image", "img", "imaging", "volume", "vol", "scan", "ct", "mr", "mri", "orig"}
CONTRASTS = {
    "t1", "t1w", "t1n", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2f", "flair", "pd", "pdw", "adc", "dwi", "ed", "es",
}  # fmt: skip
CHANNEL = re.compile(r"_([0-9]{4})$")  # nnU-Net's, at the end of an image's stem
SPLIT_FOLDERS = {
    "train",
    "training",
    "test",
    "testing",
    "val",
    "validation",
    "tr",
    "ts",
    "imagestr",
    "imagests",
}
# Of several folders above a scan: a visit of the patient that is above it.
SESSION = re.compile(
    r"(ses(sion)?|s|visit|v|study|day|tp?|time|scan|baseline|follow-?up|[12][0-9]{7})[-_]?[0-9]{0,2}", re.I
)
MAX_OF_PATIENT = 16  # scans in a patient's folder; more are a dataset's
FRAME = re.compile(r"[_-](frame|phase|time|tp|t)[-_]?[0-9]+$", re.IGNORECASE)
Key = tuple[tuple[str, ...], tuple[str, ...]]  # folders and words, without those that say "image" or "label"


def folder_of(uri: str) -> str:
    return uri.rpartition("/")[0] or "."


def name_of(uri: str) -> str:
    return PurePosixPath(uri).name


# ----------------------------------------------------------------------------------------------- labels


def is_label(uri: str, root: str) -> bool:
    """Whether a file below ``root`` is named like a label map, or lies in a folder of them."""
    below = PurePosixPath(uri[len(root) :]).parts[:-1]
    # The root itself only where its name is a dataset's: people call all sorts of folders "segmentation".
    if LABELS_ROOT.fullmatch(name_of(root).lower()) or any(LABEL_FOLDER.fullmatch(f.lower()) for f in below):
        return True
    words = _words(uri)
    return len(words) > 0 and any(_bare(words[end]) in LABEL_WORDS for end in (0, -1))


def labels_of(images: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """The label map of each image that has one: the one whose name differs least beyond words such as "seg"."""
    by_key: dict[Key, list[str]] = defaultdict(list)
    for uri in labels:
        by_key[_key(uri, _without(_words(uri), LABEL_WORDS, ends=(0, -1)))].append(uri)
    found = {}
    for uri in images:
        same = next((by_key[k] for k in _label_keys(uri) if k in by_key), [])
        if same:
            found[uri] = min(same, key=lambda label: (len(label), label))
    return found


def _label_keys(image: str) -> Iterable[Key]:
    """What the label map of ``image`` may be called, the likeliest first."""
    words = _words(image)
    channelless = words[:-1] if CHANNEL.search(stem(image)) else words
    plain = _without(channelless, IMAGE_WORDS, ends=(0, -1))
    last, first = (_without(channelless, IMAGE_WORDS, ends=(end,)) for end in (-1, 0))
    for of in (words, channelless, last, first, plain, _without(plain, CONTRASTS, ends=(-1,))):
        yield _key(image, of)


def _words(uri: str) -> list[str]:
    return [word for word in re.split(r"[-_. ]+", stem(uri).lower()) if word]


def _bare(word: str) -> str:
    """A word without the number behind it."""
    return word.rstrip("0123456789") or word


def _without(words: Sequence[str], dropped: set[str], ends: Sequence[int]) -> list[str]:
    """``words`` without the first (0) or the last (-1) where it is one of ``dropped``; a number behind it stays."""
    left = list(words)
    for end in ends:
        if left and left[end] in dropped:
            left.pop(end)
        elif left and _bare(left[end]) in dropped:
            left[end] = left[end].removeprefix(_bare(left[end]))
    return left


def _key(uri: str, words: Sequence[str]) -> Key:
    folders: list[str] = []
    for folder in PurePosixPath(uri).parts[:-1]:
        match = LABEL_FOLDER.fullmatch(folder.lower()) or IMAGE_FOLDER.fullmatch(folder.lower())
        folders += [match[match.lastindex or 0]] * (match.lastindex == 2) if match else [folder]
    return tuple(folders), tuple(words)


# ------------------------------------------------------------------------------------ cases and subjects


def identify(found: Sequence[Source], root: str = "") -> list[Source]:
    """``found`` with the subject and the case's name where its list did not give them.

    - Where scans in different folders have one name (``<patient>/ct.nii.gz``), the folder is the case.
    - A number of four digits at the end (nnU-Net's channel) is no part of the subject where several channels of one
      case exist or the label map's name lacks it; else it is a part, as in ``amos_0001``.
    - Frames, contrasts and channels of one patient are of one subject, also by their folder's name, as in
      ``patient001/patient001_frame01``.
    """
    channels, patients, folders = _channel_groups(found), _patient_folders(found), _case_folders(found)
    out = []
    for source in found:
        case = folders.get(folder_of(source.uri), [])
        subject = source.subject or _bids_subject(source.uri[len(root) :])
        if case and not subject:
            # Not the session, nor what all patients have such a folder of.
            own = [f for f in case if f.lower() not in IMAGE_WORDS | CONTRASTS | SPLIT_FOLDERS]
            subject = "_".join([f for f in own if not SESSION.fullmatch(f)] or own)
        named = source.case or ("_".join([*case, stem(source.uri)]) if case else "")
        out.append(replace(source, case=named, subject=subject or _subject(source, channels, patients)))
    return out


def _case_folders(found: Sequence[Source]) -> dict[str, list[str]]:
    """The folders that are cases, because file names repeat in them -> the parts of their paths that differ.

    At least half of the names in such a folder repeat elsewhere, and there are at least as many such folders as names:
    else the names are the cases, and the folders sites or contrasts.
    """
    of_stem: dict[str, set[str]] = defaultdict(set)
    of_folder: dict[str, set[str]] = defaultdict(set)
    for source in found:
        of_stem[stem(source.uri)].add(folder_of(source.uri))
        of_folder[folder_of(source.uri)].add(stem(source.uri))
    repeated = {name for name, folders in of_stem.items() if len(folders) > 1}
    cases = {
        folder
        for folder, names in of_folder.items()
        if len(names) <= MAX_OF_PATIENT and 2 * len(names & repeated) >= len(names)
    }
    if len(cases) < len({name for f in cases for name in of_folder[f] & repeated}):
        return {}
    whole: dict[str, list[str]] = {}
    for name in repeated:
        if not of_stem[name] <= cases:
            continue
        paths = {folder: PurePosixPath(folder).parts for folder in of_stem[name]}
        before = _shared(list(paths.values()))
        behind = _shared([path[before:][::-1] for path in paths.values()])
        whole |= {f: list(path[before : len(path) - behind]) or [path[-1]] for f, path in paths.items()}
    return whole


def grouped(found: Sequence[Source]) -> list[Source]:
    """``found`` with the numbered channels of a case, ``x_0000``, ``x_0001``..., as one scan of several channels."""
    groups = _channel_groups(found)
    cases: dict[str, list[Source]] = defaultdict(list)
    for source in found:
        name = _without_channel(source.uri)
        cases[name if name in groups else source.uri].append(source)
    return [as_channels(sorted(case, key=lambda s: s.uri)) for case in cases.values()]


def chosen(found: Sequence[Source], channels: Sequence[str]) -> tuple[list[Source], list[str]]:
    """The cases that have all of ``channels``, the last words of their files' names ("flair", "T1w"), and other files.

    A case's scans lie in one folder and differ in that word only.
    """
    wanted = [channel.lower() for channel in channels]
    cases: dict[str, dict[str, Source]] = defaultdict(dict)
    other = []
    for source in found:
        name, _, word = stem(source.uri).replace("-", "_").replace(".", "_").rpartition("_")
        if word.lower() in wanted:
            cases[f"{folder_of(source.uri)}/{name}"][word.lower()] = source
        else:
            other.append(source.uri)
    out = []
    for case, own in cases.items():
        if len(own) < len(wanted):
            other += [source.uri for source in own.values()]
            continue
        ordered = [own[word] for word in wanted]
        label = next((s for s in ordered if s.label_uri), ordered[0])
        first = replace(
            ordered[0],
            case=name_of(case) or name_of(folder_of(case)),
            label_uri=label.label_uri,
            label_files=label.label_files,
            classes=label.classes,
        )
        out.append(as_channels([first, *ordered[1:]]))
    return out, other


def as_channels(case: Sequence[Source]) -> Source:
    """One scan whose channels the sources of a case are, in this order."""
    first, *others = case
    if not others:
        return first
    if len(case) > volume.MAX_CHANNELS or len({s.uri for s in case}) < len(case):
        raise UserError(
            f"{first.uri}: is listed with {len(case)} channels; give at most {volume.MAX_CHANNELS} different files"
        )
    if folder := next((s.uri for s in case if s.files), ""):
        raise UserError(f"{folder}: a DICOM series cannot be one of several channels; convert it to .nii.gz")
    name = CHANNEL.sub("", stem(first.uri))
    modality = joined(s.modality for s in case) if first.modality else ""
    return replace(first, channels=tuple(s.uri for s in others), case=first.case or name, modality=modality)


def joined(modalities: Iterable[str]) -> str:
    """The modalities of channels as one text, in which a "+" stands between channels only."""
    return volume.JOIN.join(m.replace(volume.JOIN, " ") for m in modalities)


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """How many first entries all ``paths`` have in common."""
    return len(list(takewhile(lambda entries: len(set(entries)) == 1, zip(*paths))))


def _channel_groups(found: Sequence[Source]) -> set[str]:
    """What `_without_channel` gives of the cases whose images are numbered channels."""
    numbers: dict[str, set[int]] = defaultdict(set)  # case -> channels
    groups = set()
    for source in found:
        if case := _without_channel(source.uri):
            numbers[case].add(int(stem(source.uri)[-4:]))
            if source.label_uri and not CHANNEL.search(stem(source.label_uri)):
                groups.add(case)
    alike = Counter((folder_of(case), frozenset(own)) for case, own in numbers.items())
    for case, own in numbers.items():
        few = len(own) <= volume.MAX_CHANNELS
        if few and own == set(range(len(own))) and alike[folder_of(case), frozenset(own)] > 1:
            groups.add(case)
    return groups


def _without_channel(uri: str) -> str:
    """Folder and stem of a file without the number of four digits at its end; "" where there is none."""
    match = CHANNEL.search(stem(uri))
    return f"{folder_of(uri)}/{stem(uri)[: match.start()]}" if match else ""


def _patient_folders(found: Sequence[Source]) -> set[str]:
    """The folders that are a patient's: several hold a few scans each, named after their folder, not numbered only."""
    of: dict[str, list[str]] = defaultdict(list)
    for source in found:
        of[folder_of(source.uri)].append(stem(source.uri))

    def named_after(folder: str) -> bool:
        own = name_of(folder)
        rests = [name.removeprefix(own) for name in of[folder] if name.startswith(own)]
        alike = len(rests) == len(of[folder]) <= MAX_OF_PATIENT
        return alike and all(rest[:1] in tuple("-_.") and rest.upper() != rest.lower() for rest in rests)

    patients = {folder for folder in of if named_after(folder)}
    return patients if len(patients) > 1 else set()


def _subject(source: Source, channels: set[str], patients: set[str]) -> str:
    if (folder := folder_of(source.uri)) in patients:
        return name_of(folder)
    case = _without_channel(source.uri)
    return patient(source.case or (case.rpartition("/")[2] if case in channels else stem(source.uri)))


def patient(case: str) -> str:
    """A case's name without the frame and the contrast."""
    words = re.split(r"([-_.])", FRAME.sub("", case))
    if len(words) > 2 and words[-1].lower() in CONTRASTS:
        words = words[:-2]
    return FRAME.sub("", "".join(words))


def _bids_subject(path: str) -> str:
    match = re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)", path)
    return match[1] if match else ""
