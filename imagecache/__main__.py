"""`python -m imagecache` is the `cubecache` command."""

from imagecache.launch import main

main()
