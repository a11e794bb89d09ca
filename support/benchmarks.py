"""Sets of image files: where they come from, how they lie on the disk, their splits and settings.

FGVC: five sets of birds, flowers, dogs and cars, with VPT's splits. VTAB-1K: 19 tasks in one
archive, each with 1,000 labelled images. Your own: a folder with a folder per class.
Sources: Jia et al., ECCV 2022 (VPT's splits); Zhai et al., arXiv 1910.04867 (VTAB); Le et al.,
ICLR 2025 (settings).
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.files import UsageError, digest, fetch, obtain
from support.images import Files, image_files, load_files, stratified, subfolders

SPLITS = ("train", "val", "test")
UNPACKED = "unpacked"  # data/cub/unpacked/ holds what the archive of cub held
IN21K = "vit_base_patch16_224.orig_in21k"  # the backbone of VPT and of the paper, as timm names it


def table(text: str) -> dict[str, dict[str, str]]:
    """A table in plain text as {name of the row: {name of the column: cell}}."""
    (_, *columns), *rows = [line.split() for line in text.strip().splitlines()]
    return {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}


@dataclass(frozen=True)
class Source:
    """Where the images of a benchmark come from, and how they lie in its archive.

    checksum: None if it was never published. splits: the folder of its split files. images: the
    folder that names in a split file start from.
    """

    archive: str
    checksum: str | None
    urls: tuple[str, ...]
    splits: str = ""
    images: str = "."


SOURCES = {
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
    "vtab-1k": Source(
        "vtab-1k.zip",
        None,
        ("https://huggingface.co/datasets/XiN0919/VTAB-1k/resolve/main/vtab-1k.zip",),
    ),
}

# What to do where no program may download.
MANUAL = {
    "nabirds": "NABirds is given to those who accept its terms: fill in the form at "
    "https://dl.allaboutbirds.org/nabirds"
}

# VPT's splits as the paper's code has them: JSON objects {image: class id}.
SPLITS_URL = (
    "https://raw.githubusercontent.com/Minhchuyentoancbn/ReparamPrefix/"
    "86c3ed67328f73efa151323dc84241f7c30d29d2/CV/local_datasets/json"
)
SPLIT_FILES = table("""
split          sha256
cub/train      2c8e8a0e70795ab5a992b51d3ab09aa2621b75bb7b34bb46fef0f910b3261f2d
cub/val        d2bdc9030fe8682bb8a44fca9d44b7255f641195ac1a77d5f7431ed14d343f81
cub/test       1fcf560553e94b5e56681a3981d90462de91ab4ba2dd6a2a99e1e3ff71993b6e
nabird/train   3dd8255ee2fdfa21b453585b106bf52bce2245aed5fbef1329f85cbd48f5b1ea
nabird/val     5827a289857766c2e60d77c76190555affacdc9f91cad0a851357721396f514b
nabird/test    ef6e55ec7c5e1b4cad6cabd790c595553e875dd2f7b5938694a328d4b948c69d
flowers/train  045ea598b0de30d57a543e04d42f3f4852249fd523503eae10a7d685f91b93d1
flowers/val    bc77a0c0ddbba21338bc481ae9fca5a67a3b3660d0ad6e7829c2e56240bcf985
flowers/test   da9fc987debf0617d5093462b9d18bdce01faf76e4bc5fd66a52c74c94fbd7bf
dogs/train     d9bfb65dc50f8e164d2b0d5195baf495c2f2fb184e42d9d774dbf90f4f76e836
dogs/val       d9a1ebbbc6299bc80d2570c9171ba1d9ab7c8ff869f6dc54232288a6b49b97c1
dogs/test      aed81b99b13be6ef9196bdb100c66eec0f277bc715bc9f015a2648e3fd9eb42d
cars/train     2d72bf918ee0306c0c8dbed6da796a1957a90f1224e87ba933a2960a5823a069
cars/val       f2c071f575c7d57a734740de88cf16070f59584f817f0cf2ee0cc4116f503984
cars/test      055d51db1e7df71629ba9f7e8594b326b0b533792f02baf4f17bc3e1292af166
""")

# The paper's length, base learning rate and weight decay at batch 64: for a prefix in every layer,
# then for one in the first layer alone (--shallow).
PUBLISHED = table("""
task     none        simple       deep         none-shallow  simple-shallow  deep-shallow
cub      10,50,1e-4  10,50,1e-3   10,25,1e-4   100,10,1e-4   100,1,1e-4      100,5,1e-4
nabirds  50,50,1e-4  50,50,1e-4   50,10,1e-4   50,5,0        50,1,0          50,1,1e-4
flowers  5,10,0      5,50,1e-3    5,10,1e-3    100,25,1e-4   100,25,1e-4     100,25,1e-4
dogs     100,50,0    100,25,1e-3  100,1,1e-3   100,10,1e-3   100,1,1e-3      100,0.1,1e-4
cars     200,50,0    200,10,1e-4  200,10,1e-4  100,25,0      100,10,0        100,5,1e-4
""")

# Classes, and images of train, val and test. A list of VTAB's may lack a class.
TASKS = table("""
task                  group        classes  train   val   test
cub                   FGVC             200   5394   600   5794
nabirds               FGVC             555  21536  2393  24633
flowers               FGVC             102   1020  1020   6149
dogs                  FGVC             120  10800  1200   8580
cars                  FGVC             196   7329   815   8041
cifar                 natural          100    800   200  10000
caltech101            natural          102    800   200   6084
dtd                   natural           47    800   200   1880
oxford_flowers102     natural          102    800   200   6149
oxford_iiit_pet       natural           37    800   200   3669
svhn                  natural           10    800   200  26032
sun397                natural          397    800   200  21750
patch_camelyon        specialized        2    800   200  32768
eurosat               specialized       10    800   200   5400
resisc45              specialized       45    800   200   6300
diabetic_retinopathy  specialized        5    800   200  42670
clevr_count           structured         8    800   200  15000
clevr_dist            structured         6    800   200  15000
dmlab                 structured         6    800   200  22735
kitti                 structured         4    800   200    711
dsprites_loc          structured        16    800   200  73728
dsprites_ori          structured        16    800   200  73728
smallnorb_azi         structured        18    800   200  12150
smallnorb_ele         structured         9    800   200  12150
""")


def find(name: str, data: str, root: Path) -> Path | None:
    """The folder below which a file of SOURCES[data] lies on this machine.

    It is root, or a folder in it called as the data or their archive, unpacked here or by hand.
    """
    stem = SOURCES[data].archive.split(".")[0]
    places = ("", data, stem, f"{data}/{stem}", f"{data}/{UNPACKED}", f"{data}/{UNPACKED}/{stem}")
    for place in places:
        if (root / place / name).exists():
            return root / place
    return None


def get(name: str, data: str, root: Path) -> Path:
    """The same; what is missing is downloaded and unpacked. UsageError says what you must do."""
    source, unpacked = SOURCES[data], root / data / UNPACKED
    archive = (find(source.archive, data, root) or root) / source.archive
    if not find(name, data, root):
        if data in MANUAL and not archive.exists():
            raise UsageError(
                f"{MANUAL[data]}; put {archive.name}, or the unpacked folder, into {root}"
            )
        obtain(unpacked, archive, source.urls, source.checksum)
    folder = find(name, data, root)
    if folder is None:
        raise UsageError(f"{unpacked} lacks {name}; delete it and {archive} to have both anew")
    return folder


def fgvc_splits(task: str, root: Path, download: bool) -> dict[str, dict[str, str | int]]:
    """VPT's splits {split: {image: class id}}: your own, else downloaded; {} without either."""
    splits = {}
    for split in SPLITS:
        name = f"{SOURCES[task].splits}/{split}"
        sha256 = SPLIT_FILES[name]["sha256"]
        path = root / "vpt_splits" / f"{name}.json"
        beside = find(f"{split}.json", task, root)
        if beside and digest(beside / f"{split}.json", "sha256") == sha256:
            path = beside / f"{split}.json"
        elif download:
            fetch([f"{SPLITS_URL}/{name}.json"], path, f"sha256:{sha256}")
        if not path.exists():
            return {}
        splits[split] = json.loads(path.read_text())
    return splits


def first_image(task: str, splits: dict[str, dict[str, str | int]]) -> str:
    """A file by which the images of a task are known."""
    return f"{SOURCES[task].images}/{next(iter(splits['train']))}"


def fgvc_here(task: str, root: Path) -> bool:
    """Whether splits and images are on this machine. Nothing is downloaded to find out."""
    splits = fgvc_splits(task, root, download=False)
    return bool(splits and find(first_image(task, splits), task, root))


def load_fgvc(task: str, root: Path, size: int) -> dict:
    """Birds, flowers, dogs or cars. As in VPT, an input of 224 is cut from a short side of 256."""
    splits = fgvc_splits(task, root, download=True)
    base = get(first_image(task, splits), task, root) / SOURCES[task].images

    # The number of a class is the rank of its id among *train's* ids. VPT's code ranks them within
    # each split; NABirds' val lacks two of the 555 classes, so its images would be judged wrong.
    number = {id: rank for rank, id in enumerate(sorted(set(splits["train"].values())))}
    files = {
        split: [(image, number[id]) for image, id in images.items()]
        for split, images in splits.items()
    }

    # A class is called as its folder; flowers and cars keep all images in one.
    folders = {id: Path(image).parent.name for image, id in splits["train"].items()}
    classes = [str(id) for id in number]
    if len(set(folders.values())) == len(classes):
        classes = [folders[id] for id in number]
    return load_files(root, task, base, classes, files, round(size * 256 / 224))


def vtab_here(task: str, root: Path) -> bool:
    return find(f"{task}/train800.txt", "vtab-1k", root) is not None


def load_vtab(task: str, root: Path, size: int) -> dict:
    """train800 and val200, to choose settings; the final runs train on both.

    As in VTAB, an image is resized to size x size whatever its shape.
    """
    base = get(f"{task}/train800.txt", "vtab-1k", root) / task
    classes = int(TASKS[task]["classes"])
    lists = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
    files = {split: vtab_list(base / name, classes) for split, name in lists.items()}
    return load_files(root, task, base, [str(i) for i in range(classes)], files, (size, size))


def vtab_list(path: Path, classes: int) -> Files:
    """Lines such as `images/test/000000.jpg 7`."""
    try:
        rows = [line.rsplit(" ", 1) for line in path.read_text().splitlines()]
        files = [(image, int(label)) for image, label in rows]
        if not all(0 <= label < classes for _, label in files):
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


def split_folders(folder: Path) -> dict[str, str]:
    """{"train": "Training", ...} if all folders in `folder` are named as splits; {} if classes."""
    names = subfolders(folder)
    matches = [match for match in map(SPLIT_NAME.fullmatch, names) if match]
    if len(matches) < 2:  # a train alone can also be a vehicle
        return {}
    found = {str(match.lastgroup): match.string for match in matches}
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
            others.append("images in no class")
    if others:
        endings = ", ".join(sorted(set(others)))
        print(f"{top}: {len(others)} files ignored: {endings}", file=sys.stderr)

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
    meant = f"name {inner}" if subfolders(inner) else "put a folder for each class into it"
    raise UsageError(f"{top} has one class, '{min(classes)}', and needs two or more; {meant}")


def divide(images: dict[str, str], *shares: float) -> list[dict[str, str]]:
    """Stratified parts, always the same, cut after these shares of all images."""
    if len(images) < 10:
        raise UsageError(f"{len(images)} images are too few; to be split, they must be at least 10")
    items = list(images.items())
    order = stratified(np.array([name for _, name in items]))
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
    # Read the classes, of every split if there are splits.
    found = split_folders(folder) or {"train": ""}
    parts = {split: classes_of(folder, name) for split, name in found.items()}
    images = {file: name for part in parts.values() for file, name in part.items()}
    classes = sorted(set(parts["train"].values()))
    refuse_one_class(folder / found["train"], set(classes))
    for split, part in parts.items():
        if strange := sorted(set(part.values()) - set(classes)):
            here, there = folder / found[split], folder / found["train"]
            raise UsageError(f"{here} has the class '{strange[0]}', but {there} has not")

    # Make the splits that are missing.
    listing = None
    if (folder / "split.json").exists():
        listing = own_split(folder / "split.json", images)
    elif len(parts) == 1:
        listing = dict(zip(SPLITS, divide(images, 0.8, 0.9), strict=True))
    elif len(parts) == 2:
        said = "no folder for val: val is a tenth of train"
        if "test" not in parts:
            said = "no folder for test: val is tested on, and a tenth of train becomes val"
            parts["test"] = parts["val"]
        print(f"{folder} has {said}", file=sys.stderr)
        train, val = divide(parts["train"], 0.9)
        listing = {"train": train, "val": val, "test": parts["test"]}

    files = {
        split: [(file, classes.index(name)) for file, name in (listing or parts)[split].items()]
        for split in SPLITS
    }
    made = load_files(root, folder.absolute().name, folder, classes, files, round(size * 256 / 224))
    return made | {"listing": listing}
