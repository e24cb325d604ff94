"""Convert the weights of BLIP, CLIP or SigLIP between the formats in which they are published.

    python tools/convert_checkpoint.py --checkpoint model_base_vqa.pth --tokenizer vocab.txt --to transformers --out blip-vqa
    python tools/convert_checkpoint.py --checkpoint blip-vqa-base --to blip --out blip_vqa.pth
    python tools/convert_checkpoint.py --checkpoint ViT-B-32.pt --to transformers --out clip-vit-base-patch32

--checkpoint is a file of weights (BLIP's, OpenAI's, open_clip's, this project's), or a folder of transformers.
--to is transformers (a folder), blip (BLIP's .pth), openai or open_clip (a state dict, for open_clip with its config), or madtp
(the names of this project).
A run's config.yaml beside the file, or --config, tells the attention heads, which weights do not show.
No tensor changes. A weight that is not known stops the conversion; docs/formats.md lists those that are left out.
"""

import argparse

from tools.convert.blip import convert_blip
from tools.convert.clip import convert_clip
from tools.convert.files import check_free, open_source
from tools.convert.siglip import POOLS, convert_siglip
from utils import UserError, run_main, user_path

FORMATS = ("transformers", "blip", "openai", "open_clip", "madtp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=user_path, required=True, metavar="PATH", help="file of weights, or a folder")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format to write")
    parser.add_argument("--out", type=user_path, required=True, metavar="PATH", help="the file, or for transformers the folder")
    parser.add_argument("--config", type=user_path, metavar="FILE", help="config.yaml of the run, if not next to the checkpoint")
    parser.add_argument("--tokenizer", metavar="PATH", help="vocab.txt or its folder, if no config names it")
    args = parser.parse_args()
    check_free(args.out)
    source = open_source(args.checkpoint, args.config, args.tokenizer)
    names = source.weights.keys()
    if any(name in names for name in POOLS):
        convert = convert_siglip
    elif "visual.conv1.weight" in names or "visual_projection.weight" in names:
        convert = convert_clip
    elif any(name.startswith(("visual_encoder.", "vision_model.")) for name in names):
        convert = convert_blip
    else:
        raise UserError(f"{args.checkpoint}: neither a BLIP nor a CLIP of this project, nor a SigLIP; give one of these")
    print("\n".join(convert(source, args.to, args.out)))


if __name__ == "__main__":
    run_main(main)
