"""Small image files that carry things beside their pixels, put together byte by byte: for each a carrier of
`image_carriers.CARRIERS`, as cameras, phones and other programs write them."""

import hashlib
import io
import struct
import zlib

import numpy as np
from PIL import Image, features

from image_files import ICC, draw, exif

HEIGHT, WIDTH = 32, 48
IIM = b"\x1c\x02\x78\x00\x07Caption" + b"\x1c\x02\x50\x00\x06Person"
VIDEO = (
    struct.pack(">I", 24)
    + b"ftypmp42"
    + bytes(4)
    + b"mp42isom"
    + struct.pack(">I", 508)
    + b"mdat"
    + bytes(range(250)) * 2
)
XMP_NAME = b"http://ns.adobe.com/xap/1.0/\0"
NAMESPACES = {
    "hdrgm": "http://ns.adobe.com/hdr-gain-map/1.0/",
    "GCamera": "http://ns.google.com/photos/1.0/camera/",
    "GDepth": "http://ns.google.com/photos/1.0/depthmap/",
    "Container": "http://ns.google.com/photos/1.0/container/",
    "Item": "http://ns.google.com/photos/1.0/container/item/",
    "xmpNote": "http://ns.adobe.com/xmp/note/",
    "HDRGainMap": "http://ns.apple.com/HDRGainMap/1.0/",
    "dcterms": "http://purl.org/dc/terms/",
    "dc": "http://purl.org/dc/elements/1.1/",
}


def packet(attributes: str = "", elements: str = "") -> bytes:
    """An XMP packet with a title, which always stays, and what is given."""
    used = {name: space for name, space in NAMESPACES.items() if f"{name}:" in attributes + elements or name == "dc"}
    spaces = " ".join(f'xmlns:{name}="{space}"' for name, space in used.items())
    body = f'<dc:title><rdf:Alt><rdf:li xml:lang="x-default">Title</rdf:li></rdf:Alt></dc:title>{elements}'
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" {spaces} {attributes}>{body}</rdf:Description></rdf:RDF></x:xmpmeta>'
        '<?xpacket end="w"?>'
    ).encode()


def directory(*items: tuple[str, str, int], as_elements: bool = False) -> str:
    """Google's list of a file's parts: semantic, media type and length of each after the photo."""
    parts = [("Primary", "image/jpeg", 0), *items]
    written = ""
    for semantic, mime, length in parts:
        properties = {"Semantic": semantic, "Mime": mime, "Length": length}
        if as_elements:
            inner = "".join(f"<Item:{name}>{value}</Item:{name}>" for name, value in properties.items())
            item = f'<Container:Item rdf:parseType="Resource">{inner}</Container:Item>'
        else:
            inner = " ".join(f'Item:{name}="{value}"' for name, value in properties.items())
            item = f"<Container:Item {inner}/>"
        written += f'<rdf:li rdf:parseType="Resource">{item}</rdf:li>'
    return f"<Container:Directory><rdf:Seq>{written}</rdf:Seq></Container:Directory>"


def segment(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(content) + 2) + content


def jpeg(
    *segments: bytes, tail: bytes = b"", grey: bool = False, jfif: bytes | None = None, **options: object
) -> bytes:
    buffer = io.BytesIO()
    pixels = draw(height=HEIGHT, width=WIDTH)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(buffer, "JPEG", quality=95, **options)
    data = buffer.getvalue()
    data = data if jfif is None else data[:13] + jfif + data[18:]
    return data[:2] + b"".join(segments) + data[2:] + tail


def app1(xmp: bytes) -> bytes:
    return segment(0xE1, XMP_NAME + xmp)


def mpf(first: int, second: int, offset: int, kind: int = 0) -> bytes:
    entries = struct.pack(">IIIHH", 0x30000, first, 0, 0, 0) + struct.pack(">IIIHH", kind, second, offset, 0, 0)
    index = struct.pack(">HHI4s", 0xB000, 7, 4, b"0100") + struct.pack(">HHII", 0xB001, 4, 1, 2)
    index += struct.pack(">HHII", 0xB002, 7, 32, 50) + bytes(4)
    return segment(0xE2, b"MPF\0MM\0*" + struct.pack(">IH", 8, 3) + index + entries)


def with_second_image(second: bytes, *segments: bytes, kind: int = 0) -> bytes:
    """A JPEG with another one after it, which its MPF index names."""
    before = sum(map(len, segments)) + 2
    first = len(jpeg(*segments, mpf(0, 0, 0)))
    return jpeg(*segments, mpf(first, len(second), first - before - 8, kind), tail=second)


def extended(content: bytes) -> tuple[str, bytes]:
    """The GUID of an extended XMP packet, and its segments, the last part first."""
    guid = hashlib.md5(content).hexdigest().upper()
    half = len(content) // 2
    head = b"http://ns.adobe.com/xmp/extension/\0" + guid.encode()
    parts = [(half, content[half:]), (0, content[:half])]
    return guid, b"".join(segment(0xE1, head + struct.pack(">II", len(content), at) + part) for at, part in parts)


def samsung(video: bytes) -> bytes:
    """Samsung's trailer: blocks, their directory, whose offsets count backwards from it, and its length."""
    blocks = [(0x0A01, b"Image_UTC_Data", b"1700000000000")] + [(0x0A30, b"MotionPhoto_Data", video)] * bool(video)
    body, entries, starts = b"", b"", []
    for kind, name, content in blocks:
        starts.append(len(body))
        body += struct.pack("<HHI", 0, kind, len(name)) + name + content
    for (kind, name, content), start in zip(blocks, starts, strict=True):
        entries += struct.pack("<HHII", 0, kind, len(body) - start, 8 + len(name) + len(content))
    listed = b"SEFH" + struct.pack("<II", 106, len(blocks)) + entries
    return body + listed + struct.pack("<I", len(listed)) + b"SEFT"


def png(*chunks: tuple[bytes, bytes], grey: bool = False, tail: bytes = b"", **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = draw(height=HEIGHT, width=WIDTH)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(buffer, "PNG", **options)
    data = buffer.getvalue()
    made = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:33] + b"".join(made) + data[33:] + tail


def raw_png(depth: int, colour_type: int, samples: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any depth from samples (H, W) or (H, W, C)."""
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if depth == 16:
        rows = flat.astype(">u2").view(np.uint8)
    else:
        bits = ((flat[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(height, -1)
        rows = np.packbits(bits.astype(np.uint8), axis=1)
    body = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    made = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def raw_profile(name: bytes, content: bytes) -> tuple[bytes, bytes]:
    """A block of another format as older ImageMagick puts it into a PNG."""
    text = b"\n%s\n%8d\n%s\n" % (name, len(content), content.hex().encode())
    return b"zTXt", b"Raw profile type " + name + b"\0\0" + zlib.compress(text)


def avif(primaries: int, transfer: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(height=HEIGHT, width=WIDTH)).save(buffer, "AVIF", quality=95)
    data = buffer.getvalue()
    place = data.index(b"colrnclx") + 8
    return data[:place] + struct.pack(">HH", primaries, transfer) + data[place + 4 :]


def webp(*chunks: tuple[bytes, bytes], **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(height=HEIGHT, width=WIDTH)).save(buffer, "WEBP", lossless=True, exif=exif(), **options)
    body = buffer.getvalue()[8:] + b"".join(k + struct.pack("<I", len(c)) + c + bytes(len(c) % 2) for k, c in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def adobe_rgb() -> bytes:
    """EXIF data that says Adobe RGB as cameras do, without a profile."""
    tags = Image.Exif()
    tags[271] = "Maker"
    tags.get_ifd(0x8769).update({40961: 65535, 40965: {1: "R03\0", 2: b"0100"}})
    return tags.tobytes()


def photoshop(*resources: tuple[int, bytes]) -> bytes:
    blocks = (b"8BIM" + struct.pack(">HHI", kind, 0, len(c)) + c + bytes(len(c) % 2) for kind, c in resources)
    return segment(0xED, b"Photoshop 3.0\0" + b"".join(blocks))


GAIN = jpeg(app1(packet('hdrgm:Version="1.0" hdrgm:GainMapMax="2.3"')), grey=True)
GAMMA_PRIMARIES = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)  # of Adobe RGB


def files() -> dict[str, tuple[str, str, bytes]]:
    """Name -> carrier, suffix and content of a file that carries it."""
    motion = f'GCamera:MotionPhoto="1" GCamera:MicroVideo="1" GCamera:MicroVideoOffset="{len(VIDEO)}"'
    listed = directory(("MotionPhoto", "video/mp4", len(VIDEO)))
    both = directory(("GainMap", "image/jpeg", len(GAIN)), ("MotionPhoto", "video/mp4", len(VIDEO)), as_elements=True)
    depth = packet('GDepth:Data="AAAA"')
    far, further = extended(depth)
    guid, longer = extended(packet(elements="<dc:subject><rdf:Bag><rdf:li>Subject</rdf:li></rdf:Bag></dc:subject>"))
    trailer = samsung(VIDEO)
    found = {
        "ultra_hdr": (
            "gain_map",
            ".jpg",
            with_second_image(
                GAIN, app1(packet('hdrgm:Version="1.0"', directory(("GainMap", "image/jpeg", len(GAIN)))))
            ),
        ),
        "iso_gain_map": (
            "gain_map",
            ".jpg",
            with_second_image(GAIN, segment(0xE2, b"urn:iso:std:iso:ts:21496:-1\0" + bytes(4))),
        ),
        "apple_gain_map": (
            "gain_map",
            ".jpg",
            with_second_image(jpeg(app1(packet('HDRGainMap:HDRGainMapVersion="65536"')), grey=True)),
        ),
        "mpf_preview": ("further_images", ".jpg", with_second_image(jpeg(), kind=0x10001)),
        "motion": ("motion_video", ".jpg", jpeg(app1(packet(motion, listed)), tail=VIDEO)),
        "ultra_hdr_motion": (
            "motion_video",
            ".jpg",
            jpeg(app1(packet('GCamera:MotionPhoto="1" hdrgm:Version="1.0"', both)), tail=GAIN + VIDEO),
        ),
        "samsung_motion": ("motion_video", ".jpg", jpeg(tail=trailer)),
        "samsung_listed": (
            "motion_video",
            ".jpg",
            jpeg(
                app1(
                    packet(
                        'GCamera:MotionPhoto="1"',
                        directory(("MotionPhoto", "video/mp4", len(trailer) - trailer.index(VIDEO))),
                    )
                ),
                tail=trailer,
            ),
        ),
        "samsung": ("samsung_trailer", ".jpg", jpeg(tail=samsung(b""))),
        "depth": (
            "depth_map",
            ".jpg",
            jpeg(app1(packet(f'GDepth:Format="RangeInverse" xmpNote:HasExtendedXMP="{far}"')), further),
        ),
        "extended": ("extended_xmp", ".jpg", jpeg(app1(packet(f'xmpNote:HasExtendedXMP="{guid}"')), longer)),
        "trailer": ("trailer", ".jpg", jpeg(tail=b"something else")),
        "credentials": (
            "content_credentials",
            ".jpg",
            jpeg(app1(packet('dcterms:provenance="self#jumbf=c2pa"')), segment(0xEB, b"JP\0\1\0\0\0\1" + bytes(20))),
        ),
        "thermal": ("thermal", ".jpg", jpeg(segment(0xE1, b"FLIR\0\1\0\0" + bytes(20)))),
        "other_segment": ("app_segments", ".jpg", jpeg(segment(0xE5, b"RMETA\0" + bytes(20)))),
        "comment": ("comment", ".jpg", jpeg(segment(0xFE, "Grüße".encode()))),
        "jfif_aspect": ("aspect", ".jpg", jpeg(jfif=struct.pack(">BHH", 0, 2, 1))),
        "dpi": ("dpi", ".jpg", jpeg(dpi=(200, 100))),
        "iptc": ("iptc", ".jpg", jpeg(photoshop((0x0404, IIM)))),
        "paths": ("photoshop", ".jpg", jpeg(photoshop((0x0404, IIM), (2000, bytes(26))))),
        "icc": ("icc_profile", ".jpg", jpeg(icc_profile=ICC)),
        "exif": ("exif", ".jpg", jpeg(exif=exif())),
        "interop": ("exif", ".jpg", jpeg(exif=adobe_rgb())),
        "xmp": ("xmp", ".jpg", jpeg(app1(packet()))),
        "cicp": ("cicp", ".png", png((b"cICP", bytes([12, 13, 0, 1])))),
        "cicp_pq": ("cicp", ".png", png((b"cICP", bytes([9, 16, 0, 1])))),
        "gamma": ("gamma", ".png", png((b"gAMA", struct.pack(">I", 45471)), (b"cHRM", GAMMA_PRIMARIES))),
        "gamma_grey": ("gamma", ".png", png((b"gAMA", struct.pack(">I", 100000)), grey=True)),
        "mastering": (
            "mastering",
            ".png",
            png((b"mDCV", bytes(16) + struct.pack(">II", 10**7, 1)), (b"cLLI", bytes(8))),
        ),
        "significant": ("significant_bits", ".png", png((b"sBIT", bytes([5, 6, 5])))),
        "background": ("background", ".png", png((b"bKGD", struct.pack(">3H", 1, 2, 3)))),
        "time": ("time", ".png", png((b"tIME", struct.pack(">H5B", 2024, 5, 1, 12, 0, 0)))),
        "png_aspect": ("aspect", ".png", png((b"pHYs", struct.pack(">IIB", 2, 1, 0)))),
        "text": ("png_texts", ".png", png((b"tEXt", b"Author\0A person"))),
        "private": ("png_chunks", ".png", png((b"prVs", b"private"))),
        "unsafe": ("app_segments", ".png", png((b"prVT", b"private"))),
        "png_tail": ("trailer", ".png", png(tail=b"something else")),
        "raw_exif": ("exif", ".png", png(raw_profile(b"exif", exif()))),
        "raw_xmp": ("xmp", ".png", png(raw_profile(b"xmp", packet()))),
        "raw_app1": ("xmp", ".png", png(raw_profile(b"APP1", XMP_NAME + packet()))),
        "raw_icc": ("icc_profile", ".png", png(raw_profile(b"icc", ICC))),
        "raw_iptc": ("iptc", ".png", png(raw_profile(b"iptc", b"8BIM\4\4\0\0" + struct.pack(">I", len(IIM)) + IIM))),
        "grey_alpha": ("alpha", ".png", raw_png(2, 0, np.arange(1536).reshape(HEIGHT, WIDTH) % 4, (b"tRNS", b"\0\2"))),
        "webp_icc": ("icc_profile", ".webp", webp(icc_profile=ICC)),
        "webp_xmp": ("xmp", ".webp", webp(xmp=packet())),
        "webp_credentials": ("content_credentials", ".webp", webp((b"C2PA", bytes(9)))),
    }
    if features.check("avif"):
        found |= {"avif_p3": ("cicp", ".avif", avif(12, 13)), "avif_hlg": ("cicp", ".avif", avif(9, 18))}
        found |= {"avif_plain": ("", ".avif", avif(1, 13))}
    return found
