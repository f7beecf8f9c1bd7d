"""What every room uses: errors, files, names, signals, run folders."""
