//go:build linux

package main

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	probe "github.com/cilium/ebpf/features"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// bpf finds out what the programs of guard make use of.
func bpf() []job.Feature {
	f := []job.Feature{{Name: "BTF", Value: supported(haveBTF())}}
	for _, h := range []struct {
		name   string
		helper asm.BuiltinFunc
	}{
		{"bpf_bind", asm.FnBind},
		{"bpf_setsockopt", asm.FnSetsockopt},
		{"bpf_sk_lookup_udp", asm.FnSkLookupUdp},
		{"bpf_sk_storage_get", asm.FnSkStorageGet},
		{"bpf_loop", asm.FnLoop},
		{"bpf_set_retval", asm.FnSetRetval},
	} {
		f = append(f, job.Feature{Name: h.name + " in cgroup/connect4", Value: supported(probe.HaveProgramHelper(ebpf.CGroupSockAddr, h.helper))})
	}
	return append(f, job.Feature{Name: "iter/udp", Value: supported(haveIterator("bpf_iter_udp"))})
}

func haveBTF() error {
	_, err := btf.LoadKernelSpec()
	return err
}

// haveIterator looks for the function that an iterator attaches to.
func haveIterator(name string) error {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return err
	}
	var function *btf.Func
	return spec.TypeByName(name, &function)
}

// supported says whether a probe has found something.
func supported(err error) string {
	switch {
	case err == nil:
		return "yes"
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, btf.ErrNotFound):
		return "no"
	}
	return err.Error()
}
