"""OCI layers in, file tables and merged trees out: the pure half of an image build.

What it is: decompression, a strict tar parser, the file table of one layer and the merge of all.
What it must never do: touch a host path, open a file or socket, read a clock or the environment;
names are keys of a virtual tree and bytes come from the stream that it is given.
State is owned by the objects handed out (stream, builder, table, tree); the package keeps none.
The rules that it follows, row by row, are in `RULES.md` beside this file.
"""
