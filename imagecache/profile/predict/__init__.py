"""What an image's program will load, read from the image's own files before anybody ran it.

From the config's entrypoint on: scripts by their first line, programs and libraries by their
dynamic section as ld.so searches for it, Python by its start-up modules and the imports that stand
at the top level of each module. Must never: run, mount or trust anything of the image; every file,
list and search is capped, and what cannot be understood is left out.
State: none; a `Prediction` lives for one call.
"""
