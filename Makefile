GO ?= go
# The race detector needs a C compiler.
RACE ?= $(shell command -v gcc >/dev/null && echo -race)
TOOL = $(GO) tool -modfile=$(CURDIR)/tools/go.mod
# The nested modules, which have dependencies that the library has not.
NESTED = conformance examples quicdial
COUNT ?= 10
BENCHTIME ?= 0.2s

.PHONY: help demo test nested conformance examples quicdial bench bench-strangers bench-quic lint cross

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

demo: ## See connections go past the ephemeral port limit (a few seconds)
	$(GO) run ./cmd/connectx demo $(DEMOFLAGS)

test: ## Run all tests on the real kernel, in network namespaces of their own
	$(GO) test $(RACE) ./...

nested: $(NESTED) ## Run the tests of all nested modules

conformance: ## Run nettest, Happy Eyeballs and the like, for net.Dialer as well
	$(GO) -C $@ test $(RACE) ./...

examples: ## Run the examples: HTTP/1 to HTTP/3, reverse proxy, TLS, gRPC, WebSocket, DNS
	$(GO) -C $@ test $(RACE) -v ./...

quicdial: ## Test QUIC over shared ports
	$(GO) -C $@ test $(RACE) ./...

bench: bin/connectx.test ## Compare with net.Dialer: COUNT alternating runs, medians and ratios
	@rm -f bin/bench.txt
	@for i in $$(seq $(COUNT)); do \
		bin/connectx.test -test.run '^$$' -test.bench '^BenchmarkDial$$' -test.benchmem -test.benchtime $(BENCHTIME) >>bin/bench.txt || exit 1; \
		printf '\rrun %d of %d' $$i $(COUNT) >&2; \
	done; echo >&2
	@$(TOOL) benchstat -col /dialer bin/bench.txt
	@uname -srm; grep -m1 '^cpu:' bin/bench.txt; echo 'medians, connectx.Dialer : net.Dialer'
	@$(TOOL) benchstat -format csv -filter .unit:ns/op -col /dialer bin/bench.txt 2>/dev/null | \
		awk -F, '/^Dial/ { sub(/-[0-9]+$$/, "", $$1); printf "%-32s %.2f\n", $$1, $$4 / $$2 }'

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

lint: ## Check with gofmt, go vet, staticcheck and go mod tidy
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	for module in . tools $(NESTED); do \
		echo "lint $$module" && cd $(CURDIR)/$$module && $(GO) mod tidy -diff && $(GO) vet ./... || exit 1; \
		test $$module = tools || $(TOOL) staticcheck ./... || exit 1; \
	done

cross: ## Build for the other systems and processors
	GOOS=linux GOARCH=arm64 $(GO) vet ./...
	GOOS=linux GOARCH=386 $(GO) vet ./...
	GOOS=darwin $(GO) vet ./...
	GOOS=windows $(GO) vet ./...
	GOOS=freebsd $(GO) vet ./...

FORCE:
