"""Shows a page on which a checkpoint answers for your own pictures, at any reduce ratio. Needs gradio.

    pip install gradio
    python tools/demo_app.py --checkpoint output/demo/nlvr_p0.5/checkpoint_best.pth

Upload pictures, write a text and move p: the page shows the answer, the patches and words that are left block by block, and the
GFLOPs and milliseconds beside those of the unpruned model. The temperature is searched on the very input. --image and --text fill
the page at the start. The page is served on this machine alone, unless --host says otherwise.
"""

import argparse
import os

from tasks.registry import TASKS, open_checkpoint
from tools.app.trial import Trial
from utils import UserError, home_expanded, run_main


def page(trial: Trial, images: list[str], text: str):
    """Builds the page, filled with pictures and a text if they are given."""
    try:
        import gradio
    except ImportError:
        raise UserError("gradio is not installed; install it with: pip install gradio") from None

    def answer(*given):
        *pictures, words, p = given
        try:
            outcome = trial(pictures, words, p)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        heading, *rows = outcome.rows()
        return "\n".join(outcome.answer), outcome.drawing, {"headers": heading, "data": rows}

    filled = images + [None] * (len(trial.pictures) - len(images))
    with gradio.Blocks(title="MADTP") as blocks:
        gradio.Markdown("## MADTP: what a pruned model sees, and what it answers")
        with gradio.Row():
            pictures = [
                gradio.Image(value, type="filepath", label=label, height=220)
                for label, value in zip(trial.pictures, filled, strict=True)
            ]
            with gradio.Column():
                words = gradio.Textbox(text, label=trial.words or "text", visible=bool(trial.words), lines=2)
                p = gradio.Slider(0, 0.9, trial.config.p, step=0.05, label="p, share of the GFLOPs to remove")
                button = gradio.Button("Answer", variant="primary")
        said = gradio.Textbox(label="answer", lines=2)
        costs = gradio.Dataframe(label="cost", interactive=False)
        gradio.Markdown("Patches and words that are left, block by block:")
        drawing = gradio.Image(show_label=False, interactive=False)
        inputs, outputs = [*pictures, words, p], [said, drawing, costs]
        button.click(answer, inputs, outputs)
        p.release(answer, inputs, outputs)
        if all(filled):
            blocks.load(answer, inputs, outputs)
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=home_expanded, required=True, metavar="FILE", help="checkpoint of a run")
    parser.add_argument("--config", type=home_expanded, metavar="FILE", help="config.yaml of the run, if not beside it")
    parser.add_argument("--task", choices=TASKS, help="the task, if the config has no key 'task'")
    parser.add_argument("--image", type=home_expanded, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--text", default="", help="what the model is to read")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if available")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve; 0.0.0.0 for other machines too")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing of a page leaves the machine
    trial = Trial(open_checkpoint(args.checkpoint, args.config, args.device, args.task))
    if len(args.image) > len(trial.pictures):
        raise UserError(f"--image: task {trial.config.task!r} takes {len(trial.pictures)} pictures, got {len(args.image)}")
    page(trial, args.image, args.text).launch(server_name=args.host, server_port=args.port, share=False)


if __name__ == "__main__":
    run_main(main)
