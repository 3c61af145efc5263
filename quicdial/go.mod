module github.com/seed22601231/connectx/quicdial

go 1.26.0

require (
	github.com/quic-go/quic-go v0.65.0
	github.com/seed22601231/connectx v0.0.0
	github.com/vishvananda/netlink v1.3.1
	golang.org/x/net v0.60.0
	golang.org/x/sys v0.49.0
)

require (
	github.com/quic-go/qpack v0.6.0 // indirect
	github.com/vishvananda/netns v0.0.5 // indirect
	golang.org/x/crypto v0.57.0 // indirect
	golang.org/x/text v0.42.0 // indirect
)

replace github.com/seed22601231/connectx => ../
