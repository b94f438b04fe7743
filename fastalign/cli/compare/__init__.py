"""`fastalign compare`: a page where people say which of two answers is better."""
