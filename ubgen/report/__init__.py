"""One HTML file about finished stage directories: what was run, what came out, and the paper's figures beside it."""
