"""Speed and memory against the libraries that do the same work: `make bench`, or `python -m bench sft dpo` for some rows of the table."""
