//go:build linux

package main

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// The size of a picture: 900 by 540 pixels.
const width, height = 675, 405

// A style is how the curves of a technique look.
type style struct {
	technique string
	fill      string
	color     color.RGBA
	width     vg.Length
	dashes    []vg.Length
	glyph     draw.GlyphDrawer // nil if none
}

// styles are in the order in which curves are drawn over one another. The
// colours are those of Okabe and Ito, which the colour-blind can tell apart.
var styles = []style{
	{"system-calls", fillRandom, rgb(0x999999), 1, []vg.Length{2, 2}, nil},
	{"bind-before-connect", fillRandom, rgb(0xe69f00), 1, nil, draw.PyramidGlyph{}},
	{"SO_REUSEADDR", fillRandom, rgb(0xcc79a7), 1, nil, draw.BoxGlyph{}},
	{"IP_BIND_ADDRESS_NO_PORT", fillRandom, rgb(0x56b4e9), 1, nil, draw.PlusGlyph{}},
	{"random-port", fillRandom, rgb(0x009e73), 1, nil, draw.RingGlyph{}},
	{"port-ring", fillRandom, rgb(0x8c6d1f), 1, nil, draw.TriangleGlyph{}},
	{"article", fillRandom, rgb(0x000000), 1, nil, draw.SquareGlyph{}},
	{"net.Dialer", fillRandom, rgb(0xd55e00), 2.5, nil, nil},
	{"net.Dialer", fillOwn, rgb(0xd55e00), 2.5, []vg.Length{6, 3}, nil},
	{"connectx.Dialer+source", fillRandom, rgb(0x0072b2), 1, nil, draw.CircleGlyph{}},
	{"connectx.Dialer", fillRandom, rgb(0x0072b2), 3, nil, nil},
	{"connectx.Dialer", fillOwn, rgb(0x0072b2), 3, []vg.Length{6, 3}, nil},
}

func rgb(hex uint32) color.RGBA {
	return color.RGBA{uint8(hex >> 16), uint8(hex >> 8), uint8(hex), 0xff}
}

func (s style) line() draw.LineStyle {
	return draw.LineStyle{Color: s.color, Width: s.width, Dashes: s.dashes}
}

// sans is the font of all text, in points.
func sans(size vg.Length) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
}

// drawPicture draws the picture of a table: the medians to the left, and the
// 99th percentiles to the right.
func drawPicture(table, picture, network string) error {
	rows, err := readRows(table)
	if err != nil {
		return err
	}
	plots := [][]*plot.Plot{{newPlot(), newPlot()}}
	p50, p99 := plots[0][0], plots[0][1]
	for _, s := range styles {
		if err := s.add(p50, rows, func(r row) time.Duration { return r.p50 }); err != nil {
			return fmt.Errorf("%s: %w", table, err)
		}
		if err := s.add(p99, rows, func(r row) time.Duration { return r.p99 }); err != nil {
			return fmt.Errorf("%s: %w", table, err)
		}
	}
	// One scale for both.
	low, high := min(p50.Y.Min, p99.Y.Min), max(p50.Y.Max, p99.Y.Max)
	for _, p := range plots[0] {
		p.Y.Min, p.Y.Max = low/1.1, high*1.2
		p.X.Min, p.X.Max = 0, 99.9
	}

	c := vgsvg.New(width, height)
	whole := draw.New(c)
	whole.SetColor(color.White)
	whole.Fill(whole.Rectangle.Path())
	write(whole, 10, height-20, sans(13), fmt.Sprintf(
		"%s: time to dial, by how many of the %s ports towards the destination are taken",
		strings.ToUpper(network), thousands(rows[0].ports)))
	write(whole, 10, 20, sans(8),
		"Ports are taken at random by other processes; own fill: by the technique itself. "+
			"\u00d7: from here on most dials fail. At 100 % all do.")
	write(whole, 10, 8, sans(8), fmt.Sprintf("Loopback. %s, %s, %s.", rows[0].kernel, rows[0].machine, rows[0].date))
	const legendWidth = 155
	tiles := draw.Tiles{Rows: 1, Cols: 2, PadX: 14, PadLeft: 10, PadRight: 12, PadTop: 48, PadBottom: 38}
	for i, c := range plot.Align(plots, tiles, draw.Crop(whole, 0, -legendWidth, 0, 0))[0] {
		plots[0][i].Draw(c)
		title := [...]string{"median", "99th percentile"}[i]
		write(whole, plots[0][i].DataCanvas(c).Min.X, height-42, sans(11), title)
	}
	legend(rows).Draw(draw.Crop(whole, width-legendWidth, 0, 60, -45))

	var out bytes.Buffer
	if _, err := c.WriteTo(&out); err != nil {
		return err
	}
	// Where there is no Liberation, something like it will do.
	svg := bytes.ReplaceAll(out.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;"))
	return os.WriteFile(picture, svg, 0o666)
}

func newPlot() *plot.Plot {
	p := plot.New()
	for _, axis := range []*plot.Axis{&p.X, &p.Y} {
		axis.Label.TextStyle.Font = sans(10)
		axis.Tick.Label.Font = sans(9)
		axis.Padding = 0
	}
	p.X.Label.Text = "ports taken (%)"
	p.X.Scale = takenScale{}
	p.X.Tick.Marker = ticks(occupancyTicks)
	p.Y.Scale = plot.LogScale{}
	p.Y.Tick.Marker = ticks(durationTicks)
	grid := plotter.NewGrid()
	grid.Vertical.Color = color.Gray{0xe0}
	grid.Horizontal.Color = color.Gray{0xe0}
	p.Add(grid)
	return p
}

// takenScale is the scale of percentages of ports. It makes room at its end,
// where there is as much to see between 99 and 99.9 as between 90 and 99, and
// leaves some to its beginning.
type takenScale struct{}

func (takenScale) Normalize(low, high, x float64) float64 {
	place := func(x float64) float64 { return 1.2*x/100 - math.Log10(1-x/100) }
	return (place(x) - place(low)) / (place(high) - place(low))
}

type ticks []plot.Tick

func (t ticks) Ticks(low, high float64) []plot.Tick {
	return slices.DeleteFunc(slices.Clone(t), func(t plot.Tick) bool { return t.Value < low || t.Value > high })
}

var occupancyTicks = []plot.Tick{
	{Value: 0, Label: "0"}, {Value: 25, Label: "25"}, {Value: 50, Label: "50"}, {Value: 75, Label: "75"}, {Value: 90, Label: "90"},
	{Value: 95, Label: "95"}, {Value: 99, Label: "99"}, {Value: 99.9, Label: "99.9"},
}

// durationTicks are in microseconds.
var durationTicks = []plot.Tick{
	{Value: 10, Label: "10 \u00b5s"}, {Value: 30}, {Value: 100, Label: "100 \u00b5s"}, {Value: 300},
	{Value: 1e3, Label: "1 ms"}, {Value: 3e3}, {Value: 1e4, Label: "10 ms"}, {Value: 3e4},
	{Value: 1e5, Label: "100 ms"}, {Value: 3e5}, {Value: 1e6, Label: "1 s"},
}

// add draws the curve of one technique, up to where most of its dials fail.
func (s style) add(p *plot.Plot, rows []row, of func(row) time.Duration) error {
	points, fails := s.points(rows, of)
	if len(points) == 0 {
		return nil // another protocol's technique
	}
	line, err := plotter.NewLine(points)
	if err != nil {
		return fmt.Errorf("%s: %w", s.technique, err)
	}
	line.LineStyle = s.line()
	p.Add(line)
	if s.glyph != nil {
		scatter, err := plotter.NewScatter(points)
		if err != nil {
			return fmt.Errorf("%s: %w", s.technique, err)
		}
		scatter.GlyphStyle = draw.GlyphStyle{Color: s.color, Radius: 2, Shape: s.glyph}
		p.Add(scatter)
	}
	if fails {
		end, err := plotter.NewScatter(points[len(points)-1:])
		if err != nil {
			return fmt.Errorf("%s: %w", s.technique, err)
		}
		end.GlyphStyle = draw.GlyphStyle{Color: s.color, Radius: 5, Shape: draw.CrossGlyph{}}
		p.Add(end)
	}
	return nil
}

// points is the curve of the technique, in percent and microseconds. It reports
// whether the curve ends before the ports do.
func (s style) points(rows []row, of func(row) time.Duration) (points plotter.XYs, fails bool) {
	for _, r := range rows {
		if r.technique != s.technique || r.fill != s.fill || r.occupancy == 100 {
			continue
		}
		if 2*r.failures > r.dials {
			return points, true
		}
		points = append(points, plotter.XY{X: r.occupancy, Y: float64(of(r)) / float64(time.Microsecond)})
	}
	return points, false
}

// legend has the techniques in the order in which their medians end, the
// slowest at the top.
func legend(rows []row) *plot.Legend {
	last := func(s style) float64 {
		points, fails := s.points(rows, func(r row) time.Duration { return r.p50 })
		if len(points) == 0 {
			return 0
		}
		if fails {
			return math.Inf(1)
		}
		return points[len(points)-1].Y
	}
	order := slices.DeleteFunc(slices.Clone(styles), func(s style) bool { return last(s) == 0 })
	slices.SortStableFunc(order, func(a, b style) int {
		if last(a) > last(b) {
			return -1
		}
		return 1
	})
	l := plot.NewLegend()
	l.Top, l.Left = true, true
	l.TextStyle.Font = sans(8.5)
	l.ThumbnailWidth = 22
	l.Padding = 5
	for _, s := range order {
		name := s.technique
		if s.fill == fillOwn {
			name += " (own fill)"
		}
		l.Add(name, s)
	}
	return &l
}

// Thumbnail draws the style into the legend.
func (s style) Thumbnail(c *draw.Canvas) {
	middle := c.Center()
	c.StrokeLine2(s.line(), c.Min.X, middle.Y, c.Max.X, middle.Y)
	if s.glyph != nil {
		c.DrawGlyph(draw.GlyphStyle{Color: s.color, Radius: 2, Shape: s.glyph}, middle)
	}
}

// write puts a line of text at a place.
func write(c draw.Canvas, x, y vg.Length, f font.Font, line string) {
	c.FillText(text.Style{Color: color.Black, Font: f, Handler: plot.DefaultTextHandler}, vg.Point{X: x, Y: y}, line)
}

// thousands writes 28232 as 28,232.
func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", thousands(n/1000), n%1000)
}
