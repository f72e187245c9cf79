"""What lies below a folder: its images in a fixed order, and all that a person would rather know of at once."""

import os
from collections import Counter
from collections.abc import Iterable

from ..errors import UserError

# what `decoding` reads
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k",
)  # fmt: skip
# images too, and meant as such, but nothing here reads them
UNREAD_IMAGE_ENDINGS = (
    ".heic", ".heif", ".avif", ".jxl", ".mpo", ".svg", ".psd", ".xcf", ".tga", ".exr", ".hdr", ".dcm",
    ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2", ".pef",
)  # fmt: skip
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# left there by systems, not by people; names that begin with a dot are left out likewise
SYSTEM_NAMES = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information",
    "lost+found",
}  # fmt: skip


def shown(path: str) -> str:
    """The path as it can be printed in one line anywhere: what is not UTF-8 or not printable is escaped."""
    if path.isprintable():
        return path
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def some(items: Iterable[object], limit: int = 5) -> str:
    """The first of these items, separated by commas, and how many more there are."""
    texts = list(map(str, items))
    rest = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + rest


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


class Listing:
    """What lies below `root`. `left_out` counts, by ending, the files that are no images.

    Raises UserError naming the first entry that cannot be listed or read, a link that leads nowhere, out of `root` or
    in a circle, an image in a format that nothing here reads, and a metadata file that is not in `root` itself.
    """

    def __init__(self, root: str):
        self.root, self.real_root = root, os.path.realpath(root)
        self.left_out: Counter[str] = Counter()
        # a folder is kept with the real paths of all folders from the root down to it: a circle returns to one of them
        self.files, self.folders = self._entries(root, (self.real_root,))
        self.metadata = [path for path in self.files if os.path.basename(path) in METADATA_NAMES]
        self.loose_images = self._images([path for path in self.files if path not in self.metadata])

    def images_below(self, folder: tuple[str, tuple[str, ...]]) -> list[str]:
        """The images in one of `folders` and below it: a folder's own files first, names sorted."""
        images: list[str] = []
        waiting = [folder]
        while waiting:
            files, folders = self._entries(*waiting.pop())
            for path in files:
                if os.path.basename(path) in METADATA_NAMES:
                    raise UserError(
                        f"{shown(path)} is not read: metadata lies in {shown(self.root)} itself; move its rows there, "
                        "file names from there on, or rename it."
                    )
            images += self._images(files)
            waiting += reversed(folders)
        return images

    def left_out_note(self) -> str | None:
        """How many files are left out, by ending; None where none is."""
        count = self.left_out.total()
        if not count:
            return None
        kinds = some((f"{shown(ending) or 'no ending'} {number}" for ending, number in self.left_out.most_common()), 8)
        few, many = "1 file is no image by its ending and is", f"{count} files are no images by their ending and are"
        return f"{shown(self.root)}: {few if count == 1 else many} left out: {kinds}."

    def _entries(self, folder: str, chain: tuple[str, ...]) -> tuple[list[str], list[tuple[str, tuple[str, ...]]]]:
        files, folders = [], []
        try:
            with os.scandir(folder) as found:
                entries = sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda entry: entry.name)
            for entry in entries:
                target = self._target(entry.path, chain) if entry.is_symlink() else None
                if entry.is_dir():
                    folders.append((entry.path, (*chain, target or os.path.join(chain[-1], entry.name))))
                elif entry.is_file():
                    files.append(entry.path)
                else:
                    raise UserError(f"{shown(entry.path)} is neither a file nor a folder; remove it.")
        except OSError as error:
            raise UserError(
                f"{shown(folder)} cannot be listed: {error.strerror}; give yourself the right to read it, or remove it."
            ) from error
        return files, folders

    def _target(self, link: str, chain: tuple[str, ...]) -> str:
        target = os.path.realpath(link)
        if not os.path.exists(link):
            raise UserError(f"{shown(link)} is a link to {shown(os.readlink(link))}, which is not there; remove it.")
        if not os.path.join(target, "").startswith(os.path.join(self.real_root, "")):
            raise UserError(
                f"{shown(link)} is a link to {shown(target)}, outside {shown(self.root)}; put a copy in its place."
            )
        if target in chain:
            raise UserError(f"{shown(link)} is a link to a folder that it lies in ({shown(target)}); remove it.")
        return target

    def _images(self, files: list[str]) -> list[str]:
        images = []
        for path in files:
            ending = os.path.splitext(path)[1].lower()
            if ending in IMAGE_ENDINGS:
                if not os.access(path, os.R_OK):
                    raise UserError(f"{shown(path)} cannot be read: permission denied; allow it, or remove the file.")
                images.append(path)
            elif ending in UNREAD_IMAGE_ENDINGS:
                raise UserError(
                    f"{shown(path)} is an image of a kind that is not read here ({ending}); convert it to JPEG or PNG, "
                    "or remove it."
                )
            else:
                self.left_out[ending] += 1
        return images
