module github.com/seed22601231/connectx/conformance

go 1.26.0

require (
	github.com/google/go-cmp v0.7.0
	github.com/seed22601231/connectx v0.0.0
	go.uber.org/goleak v1.3.0
	golang.org/x/net v0.60.0
	golang.org/x/sys v0.49.0
)

require (
	github.com/vishvananda/netlink v1.3.1 // indirect
	github.com/vishvananda/netns v0.0.5 // indirect
)

replace github.com/seed22601231/connectx => ../
