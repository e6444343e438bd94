"""What `ubgen-dataset` does with datasets: verify, compare, convert, and describe them."""
