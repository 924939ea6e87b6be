# Everything that is done with this repository. What takes more than a few lines is a program in tools/.

COMMIT   ?= $(shell test -e .git && git rev-parse --short HEAD 2>/dev/null || echo unknown)
PORT     ?= 49983
FUZZTIME ?= 20s
MODULES  := $(patsubst %/,%,$(dir $(wildcard go.mod */go.mod)))

# The Go that go.mod names makes the binary, whichever go is installed; the environment may overrule it.
export GOTOOLCHAIN ?= $(shell sed -n 's/^toolchain //p' go.mod)

.PHONY: build run test check bench vm proto fuzz clean help

build: ## build bin/envd (the default)
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.commit=$(COMMIT)' -o bin/envd .

run: build ## start envd on this machine, run a command in it, go on until Ctrl-C (ONCE=1: stop; PORT=49983)
	@exec go -C tools tool run -port $(PORT) $(if $(ONCE),-once) "$(CURDIR)/bin/envd"

test: ## install what the tests need (as root), run all of them (RACE=1: with the race detector)
	@RACE=$(RACE) tools/setup
	@PATH="$(CURDIR)/bin/node:$$PATH" go -C tools tool testreport -allow skips.txt $(if $(RACE),-race) $(MODULES:%=../%)

check: ## gofmt, go vet and staticcheck, in every module
	@tools/check $(MODULES)

bench: ## measure envd against baselines
	@cd bench && go run .

vm: ## run the tests that boot a virtual machine
	@echo 'make vm: not built yet, nothing was tested'

proto: ## make proto/*.go from proto/*.proto
	@go -C tools tool protogen ../proto

fuzz: ## run each fuzz target for FUZZTIME (20s)
	@tools/fuzz $(FUZZTIME)

clean: ## remove what the other targets made
	rm -rf bin e2e/node_modules e2e/.venv

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.* ## /make \1\t/p' Makefile | expand -t 12
