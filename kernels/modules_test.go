//go:build linux

package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseModinfo(t *testing.T) {
	info := "license=GPL\x00alias=net-pf-16-proto-4-type-2-17\x00\x00\x00alias=rtnl-link-x\x00depends=inet_diag,a-b\x00intree=Y\x00"
	depends, aliases := parseModinfo([]byte(info))
	if diff := cmp.Diff([]string{"inet_diag", "a_b"}, depends); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"net-pf-16-proto-4-type-2-17", "rtnl-link-x"}, aliases); diff != "" {
		t.Error(diff)
	}
	if depends, _ := parseModinfo([]byte("depends=\x00name=inet_diag\x00")); depends != nil {
		t.Errorf("a module that depends on none depends on %q", depends)
	}
}

func TestModuleName(t *testing.T) {
	for file, want := range map[string]string{
		"kernel/drivers/net/dummy.ko":                         "dummy",
		"kernel/net/ipv4/tcp-diag.ko.xz":                      "tcp_diag",
		"kernel/drivers/virtio/virtio_pci_legacy_dev.ko.zstd": "virtio_pci_legacy_dev",
	} {
		if got := moduleName(file); got != want {
			t.Errorf("moduleName(%q) = %q, want %q", file, got, want)
		}
	}
}
