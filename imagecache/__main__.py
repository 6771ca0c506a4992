"""`python -m imagecache` is the `cubecache` command."""

from imagecache.cli import main

main()
