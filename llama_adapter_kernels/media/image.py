"""Image files as upright RGB pictures, whatever they were."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapter_kernels.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # a decompressed picture of 300 MB


def read_image(path: Path, where: str = "") -> "Image":
    """The picture as it is meant to be seen: EXIF rotation applied, RGB (grey, CMYK, palettes and alpha converted; what
    is transparent becomes white), the first frame of an animation.

    Args:
        where: the data row, for the message.

    Raises:
        UserError: no such file, not an image, a broken one, or one of more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    begin = f"{where}: " if where else ""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is below Pillow's error
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{begin}{path}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}")
            image.seek(0)
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            elif upright.mode.startswith(("I", "F")):
                upright = _eight_bits(upright)
            return upright.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{begin}{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{begin}{path}: not an image that Pillow knows") from None
    except Image.DecompressionBombError:
        raise UserError(f"{begin}{path}: expected at most {MAX_PIXELS:,} pixels, it has far more") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's decoders raise all of these
        raise UserError(f"{begin}{path}: a broken image ({error})") from None


def _eight_bits(image: "Image") -> "Image":
    """16-bit grey scaled to 8 bits; Pillow's own conversion clips it to white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if image.mode.startswith("I") and values.max(initial=0) > 255 else max(255.0, values.max(initial=0))
    return Image.fromarray((values.clip(0, top) / top * 255).round().astype("uint8"), "L")
