"""Building block images: pull, convert each unknown layer once, assemble, store, commit.

The pipeline (asyncio, in the caller's process) downloads, uploads and commits; converting and
assembling run in worker processes with a deadline, because they parse what strangers wrote. The
root record is written last: a killed build leaves garbage for collection, never half an image.
The pipeline owns the spool directory; workers own only the output directory they are given.
"""
