"""Sets of image files: where they come from, how they lie on the disk, their splits and settings.

FGVC: five sets of birds, flowers, dogs and cars, with VPT's splits. VTAB-1K: 19 tasks in one
archive, each with 1,000 labelled images. Your own: a folder with a folder per class.
Sources: Jia et al., ECCV 2022 (VPT's splits); Zhai et al., arXiv 1910.04867 (VTAB); Le et al.,
ICLR 2025 (settings).
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.files import UsageError, digest, fetch, obtain, verify
from support.images import Files, image_files, load_files, stratified, visible

SPLITS = ("train", "val", "test")
UNPACKED = "unpacked"  # data/cub/unpacked/ holds what the archive of cub held
IN21K = "vit_base_patch16_224.orig_in21k"  # the backbone of VPT and of the paper, as timm names it


@dataclass(frozen=True)
class Source:
    """Where the images of a benchmark come from, and how they lie in its archive.

    checksum: None if it was never published. splits: the folder of its split files. images: the
    folder that names in a split file start from. manual: what to do where no program may download.
    """

    archive: str
    checksum: str | None
    urls: tuple[str, ...]
    splits: str = ""
    images: str = ""
    manual: str = ""


FGVC = {
    "cub": Source(
        "CUB_200_2011.tgz",
        "md5:97eceeb196236b17998738112f37df78",
        (
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "https://s3.amazonaws.com/fast-ai-imageclas/CUB_200_2011.tgz",
            "https://huggingface.co/datasets/XiN0919/FGVC/resolve/main/CUB_200_2011.tgz",
        ),
        "cub",
        "images",
    ),
    "nabirds": Source(
        "nabirds.tar.gz",
        "md5:df21a9e4db349a14e2b08adfd45873bd",
        (),
        "nabird",
        "images",
        "NABirds is given to those who accept its terms: fill in the form at "
        "https://dl.allaboutbirds.org/nabirds",
    ),
    "flowers": Source(
        "102flowers.tgz",
        "md5:52808999861908f626f3c1f4e79d11fa",
        (
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz",
            "https://thor.robots.ox.ac.uk/datasets/flowers-102/102flowers.tgz",
        ),
        "flowers",
    ),
    "dogs": Source(
        "images.tar",
        "md5:1bb1f2a596ae7057f99d7d75860002ef",
        ("http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar",),
        "dogs",
        "Images",
    ),
    "cars": Source(
        "car_ims.tgz",
        "sha256:4d96e3e3e892c6b7e4a71959325c7de4804037d27ba5aaf1c756100fd94a5342",
        (
            "https://huggingface.co/datasets/XiN0919/FGVC/resolve/"
            "921e8dce38536cd5982739d85d5e9235d2cb2a76/car_ims.tgz",
        ),
        "cars",
    ),
}
VTAB = Source(
    "vtab-1k.zip",
    None,
    ("https://huggingface.co/datasets/XiN0919/VTAB-1k/resolve/main/vtab-1k.zip",),
)

# VPT's splits as the paper's code has them: JSON objects {image: class id}. Here their sha256, and
# how many images and classes they have.
SPLITS_URL = (
    "https://raw.githubusercontent.com/Minhchuyentoancbn/ReparamPrefix/"
    "86c3ed67328f73efa151323dc84241f7c30d29d2/CV/local_datasets/json"
)
SPLIT_FILES = {
    "cub/train": ("2c8e8a0e70795ab5a992b51d3ab09aa2621b75bb7b34bb46fef0f910b3261f2d", 5394, 200),
    "cub/val": ("d2bdc9030fe8682bb8a44fca9d44b7255f641195ac1a77d5f7431ed14d343f81", 600, 200),
    "cub/test": ("1fcf560553e94b5e56681a3981d90462de91ab4ba2dd6a2a99e1e3ff71993b6e", 5794, 200),
    "nabird/train": (
        "3dd8255ee2fdfa21b453585b106bf52bce2245aed5fbef1329f85cbd48f5b1ea",
        21536,
        555,
    ),
    "nabird/val": ("5827a289857766c2e60d77c76190555affacdc9f91cad0a851357721396f514b", 2393, 553),
    "nabird/test": ("ef6e55ec7c5e1b4cad6cabd790c595553e875dd2f7b5938694a328d4b948c69d", 24633, 555),
    "flowers/train": (
        "045ea598b0de30d57a543e04d42f3f4852249fd523503eae10a7d685f91b93d1",
        1020,
        102,
    ),
    "flowers/val": ("bc77a0c0ddbba21338bc481ae9fca5a67a3b3660d0ad6e7829c2e56240bcf985", 1020, 102),
    "flowers/test": ("da9fc987debf0617d5093462b9d18bdce01faf76e4bc5fd66a52c74c94fbd7bf", 6149, 102),
    "dogs/train": ("d9bfb65dc50f8e164d2b0d5195baf495c2f2fb184e42d9d774dbf90f4f76e836", 10800, 120),
    "dogs/val": ("d9a1ebbbc6299bc80d2570c9171ba1d9ab7c8ff869f6dc54232288a6b49b97c1", 1200, 120),
    "dogs/test": ("aed81b99b13be6ef9196bdb100c66eec0f277bc715bc9f015a2648e3fd9eb42d", 8580, 120),
    "cars/train": ("2d72bf918ee0306c0c8dbed6da796a1957a90f1224e87ba933a2960a5823a069", 7329, 196),
    "cars/val": ("f2c071f575c7d57a734740de88cf16070f59584f817f0cf2ee0cc4116f503984", 815, 196),
    "cars/test": ("055d51db1e7df71629ba9f7e8594b326b0b533792f02baf4f17bc3e1292af166", 8041, 196),
}

# The paper's (length, base lr, weight decay) at batch 64, for No-share, Simple-share and
# Deep-share: a prefix in every layer; then in the first layer alone (--shallow).
METHODS = ("none", "simple", "deep", "none-shallow", "simple-shallow", "deep-shallow")
PUBLISHED = {
    "cub": (
        *((10, 50, 1e-4), (10, 50, 1e-3), (10, 25, 1e-4)),
        *((100, 10, 1e-4), (100, 1, 1e-4), (100, 5, 1e-4)),
    ),
    "nabirds": (
        *((50, 50, 1e-4), (50, 50, 1e-4), (50, 10, 1e-4)),
        *((50, 5, 0), (50, 1, 0), (50, 1, 1e-4)),
    ),
    "flowers": (
        *((5, 10, 0), (5, 50, 1e-3), (5, 10, 1e-3)),
        *((100, 25, 1e-4), (100, 25, 1e-4), (100, 25, 1e-4)),
    ),
    "dogs": (
        *((100, 50, 0), (100, 25, 1e-3), (100, 1, 1e-3)),
        *((100, 10, 1e-3), (100, 1, 1e-3), (100, 0.1, 1e-4)),
    ),
    "cars": (
        *((200, 50, 0), (200, 10, 1e-4), (200, 10, 1e-4)),
        *((100, 25, 0), (100, 10, 0), (100, 5, 1e-4)),
    ),
}

# Classes and test images. A list of 1,000 may lack a class, so classes are not counted there.
VTAB_TASKS = {
    "natural": {
        "cifar": (100, 10000),
        "caltech101": (102, 6084),
        "dtd": (47, 1880),
        "oxford_flowers102": (102, 6149),
        "oxford_iiit_pet": (37, 3669),
        "svhn": (10, 26032),
        "sun397": (397, 21750),
    },
    "specialized": {
        "patch_camelyon": (2, 32768),
        "eurosat": (10, 5400),
        "resisc45": (45, 6300),
        "diabetic_retinopathy": (5, 42670),
    },
    "structured": {
        "clevr_count": (8, 15000),
        "clevr_dist": (6, 15000),
        "dmlab": (6, 22735),
        "kitti": (4, 711),
        "dsprites_loc": (16, 73728),
        "dsprites_ori": (16, 73728),
        "smallnorb_azi": (18, 12150),
        "smallnorb_ele": (9, 12150),
    },
}


def places(root: Path, names: tuple[str, ...], depth: int = 4) -> Iterator[Path]:
    """root and all folders that `names` alone lead to: the layouts in which people keep data."""
    yield root
    for name in names:
        if depth and (root / name).is_dir():
            yield from places(root / name, names, depth - 1)


def fgvc_places(task: str, root: Path) -> list[Path]:
    """Where the images of an FGVC task may lie, unpacked here or by hand."""
    return list(places(root, (task, UNPACKED, FGVC[task].archive.split(".")[0])))


def fgvc_splits(task: str, root: Path, download: bool = True) -> dict[str, dict[str, str | int]]:
    """VPT's splits {split: {image: class id}}: your own, else downloaded; {} without either."""
    splits = {}
    for split in SPLITS:
        name = f"{FGVC[task].splits}/{split}"
        sha256, *_ = SPLIT_FILES[name]
        kept = root / "vpt_splits" / f"{name}.json"
        paths = [kept, *(place / f"{split}.json" for place in fgvc_places(task, root))]
        right = [path for path in paths if path.exists() and digest(path, "sha256") == sha256]
        if right:
            path = right[0]
        elif download:
            path = fetch([f"{SPLITS_URL}/{name}.json"], kept, f"sha256:{sha256}")
        else:
            return {}
        splits[split] = json.loads(path.read_text())
    return splits


def fgvc_images(task: str, root: Path, splits: dict[str, dict[str, str | int]]) -> Path | None:
    """The folder below which the split's images lie, if they are on this machine."""
    some = list(splits.get("train", ()))[:10]  # a single one may be missing
    for place in fgvc_places(task, root):
        folder = place / FGVC[task].images
        if any((folder / image).exists() for image in some):
            return folder
    return None


def load_fgvc(task: str, root: Path, size: int) -> dict:
    """Birds, flowers, dogs or cars. As in VPT, an input of 224 is cut from a short side of 256."""
    splits = fgvc_splits(task, root)
    if not fgvc_images(task, root, splits):
        get(FGVC[task], root, task)
    base = fgvc_images(task, root, splits)
    if base is None:
        folder = root / task / UNPACKED
        raise UsageError(
            f"{folder} does not hold the images of {task}; delete it to have them unpacked anew"
        )

    # The number of a class is the rank of its id among *train's* ids. VPT's code ranks them within
    # each split; NABirds' val lacks two of the 555 classes, so its images would be judged wrong.
    number = {id: rank for rank, id in enumerate(sorted(set(splits["train"].values())))}
    files = {
        split: [(image, number[id]) for image, id in images.items()]
        for split, images in splits.items()
    }

    # a class is called as its folder; flowers and cars keep all images in one
    folders = {id: Path(image).parent.name for image, id in splits["train"].items()}
    if len(set(folders.values())) == len(number):
        classes = [folders[id] for id in number]
    else:
        classes = [str(id) for id in number]
    return load_files(root, task, base, classes, files, round(size * 256 / 224))


def get(source: Source, root: Path, task: str) -> None:
    """Download and unpack a benchmark's archive, or say what you must do first."""
    archives = [folder / source.archive for folder in (root, root / task)]
    archive = next((path for path in archives if path.exists()), archives[0])
    if source.manual and not archive.exists():
        raise UsageError(
            f"{source.manual}; put {source.archive}, or the unpacked folder, into {root}"
        )
    obtain(root / task / UNPACKED, archive, source.urls, source.checksum)


def vtab_images(task: str, root: Path) -> Path | None:
    """The folder of a VTAB-1K task, if it is on this machine."""
    for place in places(root, ("vtab-1k", UNPACKED, task)):
        if place.absolute().name == task and (place / "train800val200.txt").exists():
            return place
    return None


def load_vtab(task: str, classes: int, root: Path, size: int) -> dict:
    """train800 and val200, to choose settings; the final runs train on both.

    As in VTAB, an image is resized to size x size whatever its shape.
    """
    if not vtab_images(task, root):
        get(VTAB, root, "vtab-1k")
    base = vtab_images(task, root)
    if base is None:
        folder = root / "vtab-1k"
        raise UsageError(
            f"{folder} lacks the task {task}: an early upload; delete it, and put another there"
        )

    # no checksum of the lists was published: they must stay as they were at first use
    lists = {}
    (root / "cache").mkdir(parents=True, exist_ok=True)
    for name in ("train800", "val200", "train800val200", "test"):
        path = base / f"{name}.txt"
        lists[name] = vtab_list(path, classes)
        verify(path, None, root / "cache" / f"{task}-{name}.txt.sha256")
    train, val, both, test = lists.values()
    if sorted(label for _, label in train + val) != sorted(label for _, label in both):
        raise UsageError(
            f"{base}/train800val200.txt is not train800.txt and val200.txt; get another archive"
        )
    files = {"train": train, "val": val, "test": test}
    return load_files(root, task, base, [str(i) for i in range(classes)], files, (size, size))


def vtab_list(path: Path, classes: int) -> Files:
    """Lines such as `images/test/000000.jpg 7`."""
    try:
        rows = [line.rsplit(" ", 1) for line in path.read_text().splitlines()]
        files = [(image, int(label)) for image, label in rows]
        if not files or not all(0 <= label < classes for _, label in files):
            raise ValueError(f"its labels must be from 0 to {classes - 1}")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is no list of images and labels ({error}); get the archive again"
        ) from error
    return files


# "train", "Training_set", "val", "Validation", "test", "testing" and the like.
SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id|idation)?|dev)|(?P<test>test(?:ing)?))"
    r"(?:[-_ ]?(?:set|data|images))?",
    re.IGNORECASE,
)


def subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and visible(p.name))


def split_folders(folder: Path) -> dict[str, str]:
    """{"train": "Training", ...} if all folders in `folder` are named as splits; {} if classes."""
    names = subfolders(folder)
    named = {name: match.lastgroup for name in names if (match := SPLIT_NAME.fullmatch(name))}
    if len(named) < 2:  # a train alone can also be a vehicle
        return {}
    found = {split: name for name, split in named.items() if split}
    if "train" not in found or len(found) < len(names):
        raise UsageError(
            f"{folder} holds {', '.join(names)}: are these splits or classes? For splits, leave "
            "one train with one val, one test or both, and nothing else; else rename the classes"
        )
    return found


def classes_of(folder: Path, inner: str = "") -> dict[str, str]:
    """The images of folder/inner as {path below folder: class}, with a folder per class.

    What is left out is counted in a line. UsageError if a class has no image.
    """
    top, images = folder / inner, {}
    files, others = image_files(top)
    for file in files:
        name, _, rest = file.partition("/")
        if rest:
            images[(Path(inner) / file).as_posix()] = name
        else:
            others["images in no class"] += 1
    if others:
        endings = ", ".join(sorted(others))
        print(f"{top}: {others.total()} files ignored: {endings}", file=sys.stderr)

    empty = set(subfolders(top)) - set(images.values())
    if empty or not images:
        folder = top / min(empty, default="")
        raise UsageError(f"{folder} holds no images; a task needs a folder of images per class")
    return images


def refuse_one_class(top: Path, classes: set[str]) -> None:
    """UsageError, which names the folder that was meant, if there is nothing to tell apart."""
    if len(classes) > 1:
        return
    inner = top / min(classes)
    while len(names := subfolders(inner)) == 1:
        inner /= names[0]
    meant = f"name {inner}" if names else "put a folder for each class into it"
    raise UsageError(f"{top} has one class, '{min(classes)}', and needs two or more; {meant}")


def divide(images: dict[str, str], *shares: float) -> list[dict[str, str]]:
    """Stratified parts, always the same, cut after these shares of all images."""
    if len(images) < 10:
        raise UsageError(f"{len(images)} images are too few; to be split, they must be at least 10")
    items = list(images.items())
    order = stratified(np.array([name for _, name in items]), seed=0)
    parts = np.split(order, [round(share * len(items)) for share in shares])
    return [dict(sorted(items[i] for i in part)) for part in parts]


def own_split(path: Path, images: dict[str, str]) -> dict[str, dict[str, str]]:
    """A split.json {split: {file: class}} that the user put beside the images."""
    try:
        listing = json.loads(path.read_bytes())
        named = [pair for split in SPLITS for pair in listing[split].items()]
        if not all(listing[split] for split in SPLITS):
            raise ValueError("a split is empty")
        if strange := set(named) - set(images.items()):
            raise ValueError(f"it has {min(strange)}, which is not in the folder")
        if len(dict(named)) < len(named):
            raise ValueError("an image is in two splits")
    except Exception as error:
        raise UsageError(
            f"{path} must give train, val and test as {{file: class}} ({error}); mend or delete it"
        ) from error
    return listing


def load_folder(folder: Path, root: Path, size: int) -> dict:
    """Your own images: a folder per class, within folders for train, val and test or without them.

    Without them, 80 / 10 / 10 % of the images are train, val and test; a missing val is a tenth of
    train. A split made here is stratified and always the same; a run keeps it as split.json, and a
    split.json in the folder is obeyed.
    """
    # read the classes, of every split if there are splits
    found = split_folders(folder)
    parts = {split: classes_of(folder, name) for split, name in found.items()}
    known = parts["train"] if found else classes_of(folder)
    classes = sorted(set(known.values()))
    refuse_one_class(folder / found.get("train", ""), set(classes))
    images = dict(known)
    for split, part in parts.items():
        images |= part
        if strange := sorted(set(part.values()) - set(classes)):
            here, there = folder / found[split], folder / found["train"]
            raise UsageError(f"{here} has the class '{strange[0]}', but {there} has not")

    # make the splits that are missing
    listing = None
    if (folder / "split.json").exists():
        listing = own_split(folder / "split.json", images)
    elif not found:
        listing = dict(zip(SPLITS, divide(images, 0.8, 0.9), strict=True))
    elif len(found) < 3:
        said = "no folder for val: val is a tenth of train"
        if "test" not in found:
            said = "no folder for test: val is tested on, and a tenth of train becomes val"
            parts["test"] = parts["val"]
        print(f"{folder} has {said}", file=sys.stderr)
        train, val = divide(parts["train"], 0.9)
        listing = {"train": train, "val": val, "test": parts["test"]}

    files = {}
    for split in SPLITS:
        part = (listing or parts)[split]
        files[split] = [(file, classes.index(name)) for file, name in part.items()]
    task, resize = os.path.basename(os.path.abspath(folder)), round(size * 256 / 224)
    return load_files(root, task, folder, classes, files, resize) | {"listing": listing}
