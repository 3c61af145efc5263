//go:build linux

package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"
)

// How the ports come to be taken.
const (
	fillRandom = "random" // random ones by other processes, which share nothing
	fillOwn    = "own"    // by the very technique that is measured
)

// A row is what was measured of one technique at one occupancy.
type row struct {
	fill, technique string
	occupancy       float64 // percent of the ports
	dials, failures int     // failures are among the dials
	p50, p99        time.Duration
	where
}

// A where is what results depend on besides: the same for all rows of a file.
type where struct {
	ports                 int // in the ephemeral port range
	kernel, machine, date string
}

var header = []string{
	"fill", "technique", "occupancy_percent", "dials", "failures", "p50_us", "p99_us", "ports", "kernel", "machine", "date",
}

func writeRows(path string, rows []row) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := csv.NewWriter(f)
	if err := w.Write(header); err != nil {
		return err
	}
	for _, r := range rows {
		// There is no median of no successful dials.
		p50, p99 := "", ""
		if r.failures < r.dials {
			p50, p99 = microseconds(r.p50), microseconds(r.p99)
		}
		if err := w.Write([]string{
			r.fill, r.technique, strconv.FormatFloat(r.occupancy, 'f', -1, 64),
			strconv.Itoa(r.dials), strconv.Itoa(r.failures), p50, p99,
			strconv.Itoa(r.ports), r.kernel, r.machine, r.date,
		}); err != nil {
			return err
		}
	}
	w.Flush()
	return w.Error()
}

func microseconds(d time.Duration) string {
	return strconv.FormatFloat(float64(d)/float64(time.Microsecond), 'f', 1, 64)
}

func readRows(path string) ([]row, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	records, err := csv.NewReader(f).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(records) < 2 || !slices.Equal(records[0], header) {
		return nil, fmt.Errorf("%s: not a table of %q", path, header)
	}
	rows := make([]row, len(records)-1)
	for i, record := range records[1:] {
		if err := rows[i].parse(record); err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", path, i+2, err)
		}
	}
	return rows, nil
}

func (r *row) parse(record []string) error {
	var errs []error
	number := func(column int) float64 {
		n, err := strconv.ParseFloat(record[column], 64)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", header[column], err))
		}
		return n
	}
	duration := func(column int) time.Duration {
		if record[column] == "" {
			return 0
		}
		return time.Duration(number(column) * float64(time.Microsecond))
	}
	*r = row{
		fill: record[0], technique: record[1], occupancy: number(2),
		dials: int(number(3)), failures: int(number(4)), p50: duration(5), p99: duration(6),
		where: where{int(number(7)), record[8], record[9], record[10]},
	}
	return errors.Join(errs...)
}
