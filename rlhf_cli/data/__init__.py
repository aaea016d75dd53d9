"""One file per source of data; tokenisation and collation."""
