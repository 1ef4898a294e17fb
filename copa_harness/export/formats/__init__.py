"""One form of an exported program per module, each with `write(export)`; `writing.FORMS` lists them."""
