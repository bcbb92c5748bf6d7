"""Folders as systems and programs leave them: the pictures, and nothing beside them."""

from PIL import Image

from e4t_jax.data.folders import picture_files
from e4t_jax.data.sources import open_pictures

DEBRIS = ("._a.jpg", ".ipynb_checkpoints/a.png", ".Trash/b.png", "@eaDir/a.jpg", "__MACOSX/a.png", ".thumbnails/a.png")
MORE_DEBRIS = ("#recycle/a.png", "deep/.cache/a.png", "deep/@EADIR/a.png", "$RECYCLE.BIN/a.bmp")
PICTURES = ("a.png", "b.jfif", "c.JPG", "d.webp", "deep/e.tiff", "deep/er/f.bmp")


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(path)


def test_debris_is_left_out_and_whatever_pillow_opens_is_read(tmp_path):
    for name in (*PICTURES, *DEBRIS, *MORE_DEBRIS):
        write(tmp_path / ".hidden" / name)  # the given folder itself may be hidden
    folder = tmp_path / ".hidden"
    (folder / "Thumbs.db").write_bytes(b"x")
    assert [path.relative_to(folder).as_posix() for path in picture_files(folder)] == sorted(PICTURES)
    assert len(open_pictures(f"folder:{folder}", 16, tmp_path)) == len(PICTURES)


def test_linked_subfolders_are_followed_and_loops_are_not(tmp_path):
    write(tmp_path / "elsewhere" / "far.png")
    write(tmp_path / "given" / "near.png")
    (tmp_path / "given" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "given" / "loop").symlink_to(tmp_path / "given")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "given")
    found = [path.relative_to(tmp_path / "given").as_posix() for path in picture_files(tmp_path / "given")]
    assert found == ["linked/far.png", "near.png"]
