"""docs/denoising.png: a captioner at work. python docs/make_picture.py IMAGE [--checkpoint models]"""

import argparse
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from hierarchical_diffusion_rlhf_caption_refinement.captioner import MASK, Captioner

SIDE, LEFT, LINE, GAP = 300, 50, 34, 14


def draw(image: Path, captioner: Captioner, output: Path) -> None:
    """The picture, and under each denoising step the words so far, the new ones dark."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 20)
    _, *shown = captioner.stream(image)  # the first has no words yet
    height = max(SIDE, LINE * len(shown)) + 2 * GAP
    widths = [max(font.getlength(t.token), 24.0) for t in shown[-1].tokens]
    page = Image.new("RGB", (SIDE + LEFT + int(sum(widths)) + GAP * (len(widths) + 3), height), "white")
    page.paste(Image.open(image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (GAP, (height - SIDE) // 2))
    pen = ImageDraw.Draw(page)
    for step, caption in enumerate(shown, 1):
        x, y = SIDE + LEFT + 2.0 * GAP, GAP + (step - 1) * LINE + (height - 2 * GAP - LINE * len(shown)) // 2
        pen.text((SIDE + 3 * GAP, y), f"{step}", "#999999", font)
        for token, width in zip(caption.tokens, widths, strict=True):
            if token.token == MASK:
                pen.rounded_rectangle((x, y + 2, x + width, y + 25), 5, "#e6e6e6")
            else:
                pen.text((x, y), token.token, "#0b5cad" if token.step == step else "#444444", font)
            x += width + GAP
    page.quantize(128).save(output, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("--checkpoint", default="models")
    args = parser.parse_args()
    draw(args.image, Captioner.from_pretrained(args.checkpoint), Path(__file__).with_name("denoising.png"))
