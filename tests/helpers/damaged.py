"""Damages to files, for tests of what is noticed."""


def damage(path, kind, generator):
    """A random bit flipped, byte put in, or end cut off."""
    content = bytearray(path.read_bytes())
    where = generator.randrange(len(content))
    if kind == "flip":
        content[where] ^= 1 << generator.randrange(8)
    elif kind == "insert":
        content.insert(where, generator.randrange(256))
    else:
        del content[where:]
    path.write_bytes(content)
