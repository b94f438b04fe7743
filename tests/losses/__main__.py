"""`python -m tests.losses` writes docs/losses.md."""

from tests.losses.catalogue import DOCS, page

if __name__ == "__main__":
    DOCS.write_text(page(), encoding="utf-8")
