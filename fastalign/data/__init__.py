"""Data: rows of any format to checked examples to token ids, with every fault located."""
