"""Why a start took as long as it did: a report from an export's log, as data, text and one page.

`report` is pure: it joins the log of an export with the image's files and with what was brought
ahead. `text` and `page` draw a report and know nothing else, so that a stored report can be drawn
again later. Must never: ask a store, read a disk, or put an image's file name into a page without
escaping it. State: none.
"""
