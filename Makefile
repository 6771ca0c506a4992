# Aliases: the scripts in tools/ are the thing itself.
.PHONY: setup demo test soak check bench
setup demo test check bench:
	@./tools/$@
soak:
	@./tools/test --soak
