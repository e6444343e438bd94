"""Encoding an image, with the statement in it that it is synthetic: IPTC's "digital source type", as XMP.

https://iptc.org/std/photometadata/documentation/userguide/#_digital_source_type; where it goes is fixed by the XMP
specification, part 3: an APP1 segment in a JPEG file, an iTXt chunk in a PNG file.
"""

import io
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

JPEG_QUALITY = 95
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)

_APP1_BODY = b"http://ns.adobe.com/xap/1.0/\0" + XMP.encode()
_SEGMENT = b"\xff\xe1" + struct.pack(">H", len(_APP1_BODY) + 2) + _APP1_BODY
_ITXT_BODY = b"iTXt" + b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode()
_CHUNK = struct.pack(">I", len(_ITXT_BODY) - 4) + _ITXT_BODY + struct.pack(">I", zlib.crc32(_ITXT_BODY))
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER = len(_PNG) + 25  # IHDR, which must come first


def encode_image(image: Image.Image | np.ndarray, extension: str) -> bytes:
    """PNG (lossless), or JPEG of quality 95 without chroma subsampling; both say that the image is synthetic.

    `image` may be an array (H,W,3) of uint8.
    """
    return mark_synthetic(_encoded(image, extension))


def shrink(data: bytes, extension: str, short_side: int) -> bytes:
    """An encoded image scaled down (bicubic, antialiased) to this shorter side; as it is where it is no larger.

    The statement that it is synthetic is kept where it was; other metadata is not. OSError for what is no whole image.
    """
    with Image.open(io.BytesIO(data)) as image:
        if min(image.size) <= short_side:
            return data
        upright = ImageOps.exif_transpose(image).convert("RGB")
    scale = short_side / min(upright.size)
    small = upright.resize(
        (round(upright.width * scale), round(upright.height * scale)), Image.Resampling.BICUBIC
    )
    encoded = _encoded(small, extension)
    return mark_synthetic(encoded) if is_marked_synthetic(data) else encoded


def _encoded(image: Image.Image | np.ndarray, extension: str) -> bytes:
    if extension == "png":
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()
    pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    # not Pillow, which holds Python's lock while it encodes: more threads would be no faster, and others would wait
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), JPEG_QUALITY, colorspace="RGB", colorsubsampling="444", fastdct=False
    )


def mark_synthetic(data: bytes) -> bytes:
    """JPEG or PNG bytes with the statement put in after the file's own header; unchanged if it is there.

    ValueError when `data` is neither.
    """
    if data.startswith(b"\xff\xd8"):
        # JFIF wants its APP0 segment to stay the first
        place = 4 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 2
        mark = _SEGMENT
    elif data.startswith(_PNG):
        place, mark = _PNG_HEADER, _CHUNK
    else:
        raise ValueError("neither a JPEG nor a PNG image")
    if data.startswith(mark, place):
        return data
    return b"".join((data[:place], mark, data[place:]))


def is_marked_synthetic(data: bytes) -> bool:
    """Whether JPEG or PNG bytes carry the statement near their start, in whatever packet."""
    return DIGITAL_SOURCE_TYPE.encode() in data[: 1 << 16]
