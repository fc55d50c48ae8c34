"""Show text that comes from a file or from another library."""


def printable(text: str) -> str:
    r"""Replace control characters, but for the ends of lines.

    Text from a file must not drive the terminal, and half a surrogate cannot be written.

    >>> printable("a\x1b[2J\nb\ud800")
    'a?[2J\nb?'
    """
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def one_line(text: str, most: int = 1000) -> str:
    r"""Return a text as one printable line of bounded length.

    >>> one_line("a\n  b"), one_line("abcdefgh", 5)
    ('a b', 'ab...')
    """
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 3]}..."
