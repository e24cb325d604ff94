"""The model card of a compressed model."""

from pathlib import Path

from tools.compression.measure import PRUNED, WHOLE, Report
from tools.compression.sources import CARD, UNKNOWN_LICENCE, Source

TEMPLATE = """---
{licence}library_name: madtp
base_model: {name}
tags: [token-pruning, madtp]
---

# {name}, pruned to {left:.0%} of its GFLOPs

{architecture} of {library} that drops image{texts} tokens which matter little, block by block (MADTP: multimodal alignment-guided
dynamic token pruning). Its weights are those of {name}; nothing was trained.

```python
import madtp

model = madtp.load("{folder}")
```

The model is used as before: with the same inputs, and the same processor, whose files are here too. How hard it prunes is in
`madtp.json`, and `model.madtp.setting = madtp.OFF` gives the unpruned model back.

## How it was measured

| | uncompressed | pruned |
| --- | --- | --- |
| GFLOPs per sample, {calibration} calibration samples | {before:.3f} | {after:.3f} |
| GFLOPs per sample, {aside} samples kept aside | {before_aside:.3f} | {after_aside:.3f} |
| seconds per batch of {batch} on {device} | {slow:.4f} | {fast:.4f} |

{cosines}

1 GFLOP is 1e9 multiply-adds. The features of {aside} pictures that the search did not see were compared with those of the
uncompressed model. This says how much the model changed, and not how well it solves a task: measure that on your own data.

## Licence

The licence of the source is {source_licence}; it holds for these weights too.
"""


def write_card(out: Path, source: Source, p: float, report: Report) -> None:
    cosines = (
        f"Cosine between pruned and uncompressed features, {name} encoder: {found['median']:.4f} (median),"
        f" {found['worst']:.4f} (worst)."
        for name, found in report.cosine.items()
    )
    card = TEMPLATE.format(
        licence="" if source.licence == UNKNOWN_LICENCE else f"license: {source.licence}\n",
        source_licence=source.licence,
        name=source.folder.name,
        folder=out.name,
        left=1 - p,
        architecture=source.architecture,
        library=source.library,
        texts=" and text" if "language" in report.tokens else "",
        calibration=report.calibration,
        aside=report.aside,
        before=report.gflops[WHOLE],
        after=report.gflops[PRUNED],
        before_aside=report.gflops_aside[WHOLE],
        after_aside=report.gflops_aside[PRUNED],
        slow=report.seconds[WHOLE],
        fast=report.seconds[PRUNED],
        batch=report.batch_size,
        device=report.device,
        cosines="\n\n".join(cosines),
    )
    (out / CARD).write_text(card, encoding="utf-8")
