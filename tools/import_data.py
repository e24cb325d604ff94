"""Turn official annotation files into those that the loaders read, checked and counted.

    python tools/import_data.py --from karpathy --files dataset_coco.json --images datasets/coco/images --out datasets/annotations
    python tools/import_data.py --from vqa --files v2_*_questions.json v2_*_annotations.json --images datasets/coco/images --out ...
    python tools/import_data.py --from nlvr --files train.json dev.json test1.json --images datasets/NLVR2 --out ...

--from coco: COCO's captions_{train,val}2014.json -> coco_{train,val}.json
--from karpathy: dataset_coco.json -> coco_karpathy_{train,val,test}.json; dataset_flickr30k.json -> flickr30k_{train,val,test}.json
--from vqa: VQA v2's questions and annotations -> vqa_{train,val,test}.json, and answer_list.json of the frequent answers
--from nlvr: NLVR2's train, dev, test1 and test2 -> nlvr_{train,dev,test,test2}.json

Prints how many entries and pictures each file has. Nothing is written if a picture is missing in --images.
"""

import argparse
from functools import partial
from pathlib import Path

from data.loading import BadPicture
from data.nlvr import find_image
from data.official import Entries, from_coco, from_karpathy, from_nlvr, from_vqa, pictures_of
from engine.results import write_json
from utils import UserError, at_least_one, run_main, user_path

COMMON = 9  # questions whose most frequent answer a candidate is; some 3,000 answers of VQA v2 are


def missing_pictures(images: Path, names: list[str], nlvr: bool) -> list[str]:
    """Returns the pictures that are not in the folder, those of NLVR2 in any of its layouts."""
    if not nlvr:
        return [name for name in names if not (images / name).is_file()]
    lacking = []
    for name in names:
        try:
            find_image(images, name)
        except BadPicture:
            lacking.append(name)
    return lacking


def check_pictures(images: Path, found: Entries, nlvr: bool) -> None:
    """Checks that all pictures are there.

    Raises:
        UserError: naming the first that is not.
    """
    for name, entries in found.items():
        pictures = pictures_of(entries)
        if lacking := missing_pictures(images, pictures, nlvr):
            raise UserError(
                f"{images}: {len(lacking)} of {len(pictures)} pictures of {name} are missing, the first {lacking[0]}; give the"
                " folder that holds them with --images, or leave it out to check none"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="kind", choices=("coco", "karpathy", "vqa", "nlvr"), required=True, help="whose files")
    parser.add_argument("--files", type=user_path, nargs="+", required=True, metavar="FILE", help="the official files")
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder of the annotation files (ann_root)")
    parser.add_argument("--images", type=user_path, metavar="DIR", help="folder of the pictures (image_root); none: not checked")
    parser.add_argument("--min-count", type=at_least_one, default=COMMON, help="vqa: questions that a candidate answer answers")
    args = parser.parse_args()
    readers = {"coco": from_coco, "karpathy": from_karpathy, "nlvr": from_nlvr, "vqa": partial(from_vqa, min_count=args.min_count)}
    found = readers[args.kind](args.files)
    if there := next((name for name in found if (args.out / f"{name}.json").exists()), None):
        raise UserError(f"{args.out / there}.json: is there already; give another folder with --out")
    if args.images is not None:
        check_pictures(args.images, found, args.kind == "nlvr")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, entries in found.items():
        file, pictures = args.out / f"{name}.json", pictures_of(entries)
        write_json(entries, file)
        print(f"{file}: {len(entries):,} entries" + (f", {len(pictures):,} pictures" if pictures else ""))


if __name__ == "__main__":
    run_main(main)
