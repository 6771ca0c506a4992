"""preload: making images ready before anybody starts them.

Jobs (queued, one build at a time, watched by many), the client of the daemon's control API, and
the `preload` command. It must never build two images at once on one state directory. The queue
owns its jobs' states; builds belong to imagecache.
"""
