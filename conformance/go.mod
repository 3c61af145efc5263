module github.com/seed22601231/connectx/conformance

go 1.26.0

require github.com/seed22601231/connectx v0.0.0

require (
	github.com/google/go-cmp v0.7.0 // indirect
	go.uber.org/goleak v1.3.0 // indirect
	golang.org/x/net v0.60.0 // indirect
)

replace github.com/seed22601231/connectx => ../
