GO ?= go
# The race detector needs a C compiler.
RACE ?= $(shell command -v gcc >/dev/null && echo -race)
TOOL = $(GO) tool -modfile=$(CURDIR)/tools/go.mod
# The nested modules, which have dependencies that the library has not; besides
# them kernels, whose tests are not what make kernels runs, and guard, most of whose
# tests need root.
NESTED = conformance examples quicdial measure
COUNT ?= 10
# Of each benchmark of a run: its time, and the dials at each occupancy.
BENCHTIME ?= 0.1s
DIALS ?= 500
# How long make stress and make soak take, and each fuzzer of make fuzz.
DURATION ?= 10m
FUZZTIME ?= 10m
# Of the races and the stress in make guard, each with a guard or without.
RACETIME ?= 10s

.PHONY: help demo test nested conformance examples quicdial measure occupancy pictures scale bench bench-dials bench-occupancy bench-strangers bench-quic stress soak mutations kernels guard guard-object guard-bench model faults fuzz lint cross

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

demo: ## See connections go past the ephemeral port limit (a few seconds)
	$(GO) run ./cmd/connectx demo $(DEMOFLAGS)

test: ## Run all tests on the real kernel, in network namespaces of their own
	$(GO) test $(RACE) ./...

measure: ## Test the programs that measure
	$(GO) -C $@ test $(RACE) ./...

nested: $(NESTED) ## Run the tests of all nested modules
	$(GO) -C kernels test $(RACE) ./...

conformance: ## Run nettest, Happy Eyeballs and the like, for net.Dialer as well
	$(GO) -C $@ test $(RACE) ./...

examples: ## Run the examples: HTTP/1 to HTTP/3, reverse proxy, TLS, gRPC, WebSocket, DNS
	$(GO) -C $@ test $(RACE) -v ./...

quicdial: ## Test QUIC over shared ports
	$(GO) -C $@ test $(RACE) ./...

bench: bench-dials bench-occupancy ## Compare with net.Dialer and other techniques, see which limits are kept (ten minutes)

bench-dials: bin/connectx.test ## Open and close: COUNT alternating runs, medians of their ratios
	@rm -f bin/bench.txt
	@for i in $$(seq $(COUNT)); do \
		bin/connectx.test -test.run '^$$' -test.bench '^Benchmark(Dial|DialInTurn|EgressInTurn|Parallel|Techniques)$$' -test.benchmem -test.benchtime $(BENCHTIME) >>bin/bench.txt || exit 1; \
		printf '\rrun %d of %d' $$i $(COUNT) >&2; \
	done; echo >&2
	@$(TOOL) benchstat -filter '.unit:(ns/op OR allocs/op OR dials/s)' -col /dialer bin/bench.txt
	@uname -srm; nproc; grep -m1 '^cpu:' bin/bench.txt
	@$(GO) -C measure run ./ratios ../bin/bench.txt

bench-occupancy: bin/connectx.test ## Dial to a destination whose ports are taken, in part or all: the same
	@rm -f bin/occupancy.txt
	@for i in $$(seq $(COUNT)); do \
		bin/connectx.test -test.run '^$$' -test.bench '^Benchmark(Occupancy|Churn)$$' -test.benchtime $(DIALS)x >>bin/occupancy.txt && \
		bin/connectx.test -test.run '^$$' -test.bench '^Benchmark(Fill|Exhausted)$$' -test.benchtime 1x >>bin/occupancy.txt || exit 1; \
		printf '\rrun %d of %d' $$i $(COUNT) >&2; \
	done; echo >&2
	@$(TOOL) benchstat -filter '.unit:(p50-ns OR p99-ns)' -col /dialer bin/occupancy.txt
	@uname -srm; nproc; grep -m1 '^cpu:' bin/occupancy.txt
	@$(GO) -C measure run ./ratios ../bin/occupancy.txt

occupancy: ## Measure dials from 0 to 100 % of the ports taken, and draw docs/occupancy-*.svg (two minutes)
	$(GO) -C measure run ./occupancy -o $(CURDIR)/docs

pictures: ## Draw docs/occupancy-*.svg anew from their CSV files
	$(GO) -C measure run ./occupancy -plot -o $(CURDIR)/docs

scale: ## Hold 1,000,000 UDP and 250,000 TCP connections at once (five minutes; SCALEFLAGS="-udp 50000 -tcp 20000")
	@mkdir -p bin && $(GO) -C measure build -o ../bin/scale ./scale
	bin/scale $(SCALEFLAGS) -o docs/scale.txt

bench-strangers: bin/connectx.test ## Count datagrams of strangers that can be read after a dial
	bin/connectx.test -test.run '^$$' -test.bench '^BenchmarkStrangers' -test.benchtime 5s

bench-quic: ## Compare bulk transfer over QUIC with an unconnected *net.UDPConn
	@mkdir -p bin && $(GO) -C quicdial test -c -o ../bin/quicdial.test .
	@rm -f bin/quic.txt
	@for i in $$(seq $(COUNT)); do \
		bin/quicdial.test -test.run '^$$' -test.bench '^BenchmarkTransfer$$' -test.benchtime 0.5s >>bin/quic.txt || exit 1; \
		printf '\rrun %d of %d' $$i $(COUNT) >&2; \
	done; echo >&2
	@uname -srm; grep -m1 '^cpu:' bin/quic.txt; echo 'transfer time, medians: PacketConn : UDPConn, quicdial : UDPConn'
	@$(TOOL) benchstat -format csv -filter .unit:ns/op -col /dialer bin/quic.txt 2>/dev/null | \
		awk -F, '/^Transfer/ { sub(/-[0-9]+$$/, "", $$1); printf "%-32s %.2f %.2f\n", $$1, $$4 / $$2, $$8 / $$2 }'

bin/connectx.test: FORCE
	@mkdir -p bin
	$(GO) test -c -o $@ .

model: ## Check the UDP lock with spin, all orders of all steps (a minute; MODELFLAGS=-t prints the counterexamples)
	model/check $(MODELFLAGS)

stress: ## Dial so that everything collides, beside neighbours of all kinds, and check every promise (DURATION=10m STRESSFLAGS="-seed 1")
	@mkdir -p bin && $(GO) -C measure build -o ../bin/stress ./stress
	bin/stress -duration $(DURATION) $(STRESSFLAGS)

soak: ## Keep 90 % of the 4-tuples taken while connections and faults come and go: a flat line, or a failure (DURATION=10m SOAKFLAGS="-seed 1")
	@mkdir -p bin && $(GO) -C measure build -o ../bin/soak ./soak
	bin/soak -duration $(DURATION) $(SOAKFLAGS)

mutations: ## Break one line of the library at a time, and print what goes red (ten minutes, on a machine that has nothing else to do)
	$(GO) -C measure run ./mutations -o $(CURDIR)/docs/mutations.md

kernels: ## Run the tests on the running kernel, and on Debian's 6.1 and 6.12 in qemu (KERNELSFLAGS="-kernels 6.12")
	$(GO) -C kernels run . $(or $(KERNELSFLAGS),-o $(CURDIR)/docs/kernels.md)

guard: ## Test the guard (eBPF) as root, with a cgroup v2 of its own (RACETIME=10s)
	@mkdir -p bin && $(GO) -C measure build -o ../bin/stress ./stress
	$(GO) -C $@ test $(RACE) -v . -racetime $(RACETIME) -stress $(CURDIR)/bin/stress
	$(GO) -C $@ test $(RACE) -v ./cmd/...

guard-object: ## Make guard's object again from its C source, and compare (clang 14, llvm, libbpf-dev)
	@mkdir -p bin && sha256sum guard/programs_bpfel.* >bin/guard.sums && $(GO) -C guard generate . && sha256sum -c bin/guard.sums

guard-bench: ## Compare UDP connects under a guard with those without: medians of COUNT runs; and what Sync takes
	@mkdir -p bin && $(GO) -C guard test -c -o ../bin/guard.test .
	@rm -f bin/guard.txt
	@for i in $$(seq $(COUNT)); do \
		bin/guard.test -test.run '^$$' -test.bench 'Connect|Occupied' -test.benchtime $(BENCHTIME) >>bin/guard.txt || exit 1; \
		printf '\rrun %d of %d' $$i $(COUNT) >&2; \
	done; echo >&2
	@uname -srm; grep -m1 '^cpu:' bin/guard.txt; echo 'Connect, medians: deny : none, share : none. Occupied: none and share, : none of the ports taken and no guard'
	@$(TOOL) benchstat -format csv -filter .unit:ns/op -col /guard bin/guard.txt 2>/dev/null | \
		awk -F, '{ sub(/-[0-9]+$$/, "", $$1) } \
			/^Connect/ { printf "%-40s %.2f %.2f\n", $$1, $$4 / $$2, $$8 / $$2; deny[$$1] = $$4 } \
			$$1 == "Occupied/taken=0" { free = $$2 } \
			/^Occupied/ { printf "%-40s %.2f %.2f\n", $$1, $$2 / free, $$8 / free } \
			END { printf "under deny, connectx.Dialer : a dialer without its lock and lookup: %.2f\n", deny["Connect/connectx.Dialer"] / deny["Connect/net.Dialer+SO_REUSEADDR"] }'
	@bin/guard.test -test.run '^$$' -test.bench Sync >bin/guard-sync.txt && grep ^Benchmark bin/guard-sync.txt

faults: bin/connectx.test ## Make each system call of a dial fail in each way, and print what follows (half a minute)
	CONNECTX_FAULTS=bin/faults.txt bin/connectx.test -test.run '^TestFaults' -test.v

fuzz: ## Fuzz the parsers and the dials, FUZZTIME each
	@for f in lookup/FuzzReply lookup/FuzzParseReply lookup/FuzzDiagReply lookup/FuzzParseRoute \
		portpick/FuzzParsePorts portpick/FuzzWalk ./FuzzDial ./FuzzLocalAddr ./FuzzDialTyped; do \
		$(GO) test -run '^$$' -fuzz "^$${f##*/}$$" -fuzztime $(FUZZTIME) ./$${f%/*} || exit 1; \
	done

lint: ## Check with gofmt, go vet, staticcheck and go mod tidy
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	for module in . tools kernels guard $(NESTED); do \
		echo "lint $$module" && cd $(CURDIR)/$$module && $(GO) mod tidy -diff && $(GO) vet ./... || exit 1; \
		test $$module = tools || $(TOOL) staticcheck ./... || exit 1; \
	done

cross: ## Build for the other systems and processors
	GOOS=linux GOARCH=arm64 $(GO) vet ./...
	GOOS=linux GOARCH=386 $(GO) vet ./...
	GOOS=linux GOARCH=arm64 $(GO) -C guard vet ./...
	GOOS=darwin $(GO) vet ./...
	GOOS=windows $(GO) vet ./...
	GOOS=freebsd $(GO) vet ./...

FORCE:
