"""The benchmarks as data: where their images are, how they lie, VPT's splits, and the settings the paper published.

FGVC: five sets of birds, flowers, dogs and cars. VTAB-1K: 19 tasks in one archive, each with 1,000 labelled images.
Sources: Jia et al., ECCV 2022 (VPT's splits); Zhai et al., arXiv 1910.04867 (VTAB); Le et al., ICLR 2025 (settings).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.files import UsageError, digest, fetch, obtain, verify
from support.images import prepare_all

SPLITS = ("train", "val", "test")
UNPACKED = "unpacked"  # data/cub/unpacked/ holds what the archive of cub held
IN21K = "vit_base_patch16_224.orig_in21k"  # the backbone of VPT and of the paper, as timm names it


@dataclass(frozen=True)
class Source:
    """Where the images of a benchmark come from, and how they lie in its archive.

    checksum: None if it was never published. images: the folder to which the names in a split file are relative.
    splits: the folder of its split files. manual: what to do where a program may not download.
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
        "NABirds is given to those who accept its terms: fill in the form at https://dl.allaboutbirds.org/nabirds",
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
            "https://huggingface.co/datasets/XiN0919/FGVC/resolve/921e8dce38536cd5982739d85d5e9235d2cb2a76/car_ims.tgz",
        ),
        "cars",
    ),
}
VTAB = Source(
    "vtab-1k.zip",
    None,
    ("https://huggingface.co/datasets/XiN0919/VTAB-1k/resolve/main/vtab-1k.zip",),
)

# VPT's splits as the paper's code has them: JSON objects {image: class id}, with their sha256, images and classes.
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

# The paper's (length, base lr, weight decay) at batch 64.
METHODS = ("none", "simple", "deep", "none-shallow", "simple-shallow", "deep-shallow")
PUBLISHED = {
    "cub": (
        (10, 50, 1e-4),
        (10, 50, 1e-3),
        (10, 25, 1e-4),
        (100, 10, 1e-4),
        (100, 1, 1e-4),
        (100, 5, 1e-4),
    ),
    "nabirds": (
        (50, 50, 1e-4),
        (50, 50, 1e-4),
        (50, 10, 1e-4),
        (50, 5, 0),
        (50, 1, 0),
        (50, 1, 1e-4),
    ),
    "flowers": (
        (5, 10, 0),
        (5, 50, 1e-3),
        (5, 10, 1e-3),
        (100, 25, 1e-4),
        (100, 25, 1e-4),
        (100, 25, 1e-4),
    ),
    "dogs": (
        (100, 50, 0),
        (100, 25, 1e-3),
        (100, 1, 1e-3),
        (100, 10, 1e-3),
        (100, 1, 1e-3),
        (100, 0.1, 1e-4),
    ),
    "cars": (
        (200, 50, 0),
        (200, 10, 1e-4),
        (200, 10, 1e-4),
        (100, 25, 0),
        (100, 10, 0),
        (100, 5, 1e-4),
    ),
}

VTAB_TASKS = {  # classes, test images; a list of 1,000 may lack a class, so the classes are not counted there
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
    """root, and every folder below it that is reached through `names` alone: the layouts in which people keep data."""
    yield root
    for name in names:
        if depth and (root / name).is_dir():
            yield from places(root / name, names, depth - 1)


def fgvc_splits(task: str, root: Path, download: bool = True) -> dict[str, dict[str, str | int]]:
    """VPT's splits {split: {image: class id}}, verified: the user's own copy, else a downloaded one; {} without any."""
    splits = {}
    for split in SPLITS:
        name = f"{FGVC[task].splits}/{split}"
        sha256, *_ = SPLIT_FILES[name]
        kept = root / "vpt_splits" / f"{name}.json"
        paths = [kept, *(place / f"{split}.json" for place in fgvc_places(task, root))]
        path = next(
            (path for path in paths if path.exists() and digest(path, "sha256") == sha256), None
        )
        if path is None and not download:
            return {}
        path = path or fetch([f"{SPLITS_URL}/{name}.json"], kept, f"sha256:{sha256}")
        splits[split] = json.loads(path.read_text())
    return splits


def fgvc_places(task: str, root: Path) -> list[Path]:
    """Where the images of an FGVC task may lie: unpacked by hand or by `obtain`, with or without their top folder."""
    return list(places(root, (task, UNPACKED, FGVC[task].archive.split(".")[0])))


def fgvc_images(task: str, root: Path, splits: dict[str, dict[str, str | int]]) -> Path | None:
    """The folder below which the split's images lie, if they are on this machine."""
    some = list(splits.get("train", ()))[
        :10
    ]  # more than one, for a single missing image must not hide the folder
    folders = [place / FGVC[task].images for place in fgvc_places(task, root)]
    return next(
        (folder for folder in folders if any((folder / image).exists() for image in some)), None
    )


def load_fgvc(task: str, root: Path, size: int) -> dict:
    """Birds, flowers, dogs or cars with VPT's splits: the short side at 256 for an input of 224, as VPT resizes."""
    splits = fgvc_splits(task, root)
    if not fgvc_images(task, root, splits):
        get(FGVC[task], root, task)
    base = fgvc_images(task, root, splits)
    if base is None:
        raise UsageError(
            f"{root / task / UNPACKED} does not hold the images of {task}; delete it to have them unpacked anew"
        )
    # The number of a class is the rank of its id among *train's* ids. Ranked within each split, as VPT's code does it,
    # NABirds' val, where two of the 555 classes have no image, would get other numbers than train, and be judged wrong.
    number = {id: rank for rank, id in enumerate(sorted(set(splits["train"].values())))}
    folders = {id: Path(image).parent.name for image, id in splits["train"].items()}
    named = len(set(folders.values())) == len(
        number
    )  # flowers and cars keep all images in one folder
    files = {
        split: [(image, number[id]) for image, id in images.items()]
        for split, images in splits.items()
    }
    rule = round(size * 256 / 224)
    return {
        "classes": [folders[id] if named else str(id) for id in number],
        "splits": prepare_all(root, task, base, files, rule),
        "rule": rule,
    }


def get(source: Source, root: Path, task: str) -> None:
    """Download and unpack a benchmark's archive, or say what the user must do first."""
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
    """1,000 training images: train800 and val200 to choose settings, both together for the final runs."""
    if not vtab_images(task, root):
        get(VTAB, root, "vtab-1k")
    base = vtab_images(task, root)
    if base is None:
        raise UsageError(
            f"{root / 'vtab-1k'} lacks the task {task}: an early upload; delete it, and put another there"
        )
    files = {}
    for name in ("train800", "val200", "train800val200", "test"):
        files[name] = vtab_list(base / f"{name}.txt", classes)
        record = (
            root / "cache" / f"{task}-{name}.txt.sha256"
        )  # no checksum was published: it stays as at first use
        record.parent.mkdir(parents=True, exist_ok=True)
        verify(base / f"{name}.txt", None, record)
    train, val, both, test = files.values()
    if sorted(label for _, label in train + val) != sorted(label for _, label in both):
        raise UsageError(
            f"{base}/train800val200.txt is not train800.txt and val200.txt together; get another archive"
        )
    files = {"train": train, "val": val, "test": test}
    splits = prepare_all(root, task, base, files, (size, size))
    return {"classes": [str(i) for i in range(classes)], "splits": splits, "rule": (size, size)}


def vtab_list(path: Path, classes: int) -> list[tuple[str, int]]:
    """Lines such as `images/test/000000.jpg 7`."""
    try:
        rows = [line.rsplit(" ", 1) for line in path.read_text().splitlines()]
        files = [(image, int(label)) for image, label in rows]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is no list of images and labels ({error}); get the archive again"
        ) from error
    if not files or not all(0 <= label < classes for _, label in files):
        raise UsageError(
            f"{path} must name images with labels from 0 to {classes - 1}; get the archive again"
        )
    return files
