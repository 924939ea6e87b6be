# Everything that is done with this repository. What takes more than a few lines is a program in tools/.

COMMIT   ?= $(shell test -e .git && git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
PORT     ?= 49983
IMAGE    ?= bin/rootfs.ext4
FUZZTIME ?= 20s
MODULES  := $(patsubst %/,%,$(dir $(wildcard go.mod */go.mod)))

# The Go that go.mod names makes the binary, whichever go is installed; the environment may overrule it.
export GOTOOLCHAIN ?= $(shell sed -n 's/^toolchain //p' go.mod)

.PHONY: build run test check bench size profile release verify vm rootfs update-rootfs proto fuzz clean help

build: ## build bin/envd (the default)
	@COMMIT=$(COMMIT) tools/build bin/envd

run: build ## start envd on this machine, run a command in it, go on until Ctrl-C (ONCE=1: stop; PORT=49983)
	@exec go -C tools tool run -port $(PORT) $(if $(ONCE),-once) "$(CURDIR)/bin/envd"

test: ## install what the tests need (as root), run all of them (RACE=1: with the race detector)
	@RACE=$(RACE) tools/setup
	@PATH="$(CURDIR)/bin/node:$$PATH" go -C tools tool testreport -allow skips.txt $(if $(RACE),-race) $(MODULES:%=../%)

check: ## gofmt, go vet and staticcheck, in every module; govulncheck on what is shipped
	@tools/check $(MODULES)

bench: FIGURES = $(if $(SAVE),bench/figures,bin/bench)
bench: ## measure envd against baselines (QUICK=1: in 2 minutes; BASE=bin/other: against another build; ONLY=regexp; SAVE=1)
	@mkdir -p bin
	@go -C bench run . -json "$(CURDIR)/$(FIGURES).json" -only "$(ONLY)" $(if $(QUICK),-quick) \
		$(if $(BASE),-base "$$(realpath -- "$(BASE)")")
	@$(if $(BASE),,go -C bench run ./chart "$(CURDIR)/$(FIGURES).json" "$(CURDIR)/$(FIGURES).svg" && echo "drawn: $(FIGURES).svg")

size: ## what the binary is made of, package by package, and what brought each in
	@go -C tools tool size "$(CURDIR)/tools/build"

profile: ## CPU, heap and goroutines of a daemon under a load, to bin/profile (LOAD=health,start,output,upload,form,small,list,echo)
	@go -C tools tool profile -load "$(or $(LOAD),health,start,output)" "$(CURDIR)/tools/build" "$(CURDIR)/bin/profile"

release: ## bin/release: envd for amd64 and arm64, bills of materials, checksums; fails if a second build differs
	@COMMIT=$(COMMIT) tools/release bin/release

verify: ## build anew, elsewhere and with an empty cache, and compare with BINARY=bin/envd
	@COMMIT=$(COMMIT) tools/verify "$(or $(BINARY),bin/envd)" $(CACHE)

vm: ## boot a virtual machine that holds envd alone, run commands in it through envd (as root; installs QEMU)
	@tools/setup vm
	@go -C vm run .

rootfs: build ## make a disk image with envd (IMAGE=bin/rootfs.ext4; BASE=a directory or tarball to start from; SIZE=1G)
	@tools/rootfs/build bin/envd "$(IMAGE)" "$(BASE)" "$(SIZE)" && echo "$(IMAGE): boots /sbin/init"

update-rootfs: build ## put this envd into a disk image (IMAGE=bin/rootfs.ext4)
	@tools/rootfs/update bin/envd "$(IMAGE)"

proto: ## make proto/*.go from proto/*.proto
	@go -C tools tool protogen ../proto

fuzz: ## run each fuzz target for FUZZTIME (20s)
	@tools/fuzz $(FUZZTIME)

clean: ## remove what the other targets made
	rm -rf bin e2e/node_modules e2e/.venv

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## /make \1\t/p' Makefile | expand -t 20
