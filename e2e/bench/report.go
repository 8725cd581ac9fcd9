package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// figure is one quantity: the median of its samples with their spread.
type figure struct {
	Section string  `json:"section"`
	Name    string  `json:"name"`
	Unit    string  `json:"unit"`
	Median  float64 `json:"median"`
	// Low and High are the quartiles of the samples, Best the best sample.
	Low  float64 `json:"low"`
	High float64 `json:"high"`
	Best float64 `json:"best"`
	// MedianLow and MedianHigh hold what the median would be of samples without
	// end, with a confidence of 95 %.
	MedianLow  float64 `json:"medianLow"`
	MedianHigh float64 `json:"medianHigh"`
	Samples    int     `json:"samples"`
	// Target is what is asked for; nil for a figure that is only told.
	Target *target `json:"target,omitempty"`
	Note   string  `json:"note,omitempty"`
}

// target bounds a figure's median.
type target struct {
	Below float64 `json:"below,omitempty"`
	Above float64 `json:"above,omitempty"`
	Met   bool    `json:"met"`
}

func (t target) String() string {
	if t.Above != 0 {
		return fmt.Sprintf("> %s", number(t.Above))
	}
	return fmt.Sprintf("< %s", number(t.Below))
}

// report collects the figures of a run.
type report struct {
	Time    time.Time `json:"time"`
	Machine string    `json:"machine"`
	Go      string    `json:"go"`
	Figures []*figure `json:"figures"`
	Remarks []string  `json:"remarks,omitempty"`
}

func newReport() *report {
	return &report{
		Time: time.Now().UTC().Truncate(time.Second), Go: runtime.Version(),
		Machine: fmt.Sprintf("%d processors, %s/%s", runtime.NumCPU(), runtime.GOOS, runtime.GOARCH),
	}
}

// add makes a figure of samples of a quantity that is better the smaller it is.
func (r *report) add(section, name, unit string, samples []float64) *figure {
	s := slices.Sorted(slices.Values(samples))
	f := &figure{Section: section, Name: name, Unit: unit, Median: quantile(s, 0.5), Low: quantile(s, 0.25), High: quantile(s, 0.75),
		Best: s[0], Samples: len(s)}
	// The ranks of a binomial distribution's middle 95 %.
	n := float64(len(s))
	half := 0.98 * math.Sqrt(n)
	f.MedianLow, f.MedianHigh = s[max(0, int(n/2-half))], s[min(len(s)-1, int(math.Ceil(n/2+half)))]
	r.Figures = append(r.Figures, f)
	return f
}

// addRate is add for a quantity that is better the larger it is.
func (r *report) addRate(section, name, unit string, samples []float64) *figure {
	f := r.add(section, name, unit, samples)
	f.Best = slices.Max(samples)
	return f
}

func (f *figure) below(limit float64) *figure {
	f.Target = &target{Below: limit, Met: f.Median < limit}
	return f
}

func (f *figure) above(limit float64) *figure {
	f.Target = &target{Above: limit, Met: f.Median > limit}
	return f
}

func (f *figure) note(format string, args ...any) *figure {
	f.Note = fmt.Sprintf(format, args...)
	return f
}

// quantile interpolates in ascending samples.
func quantile(s []float64, q float64) float64 {
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 >= len(s) {
		return s[len(s)-1]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}

// ratios divides sample by sample: what was measured one after the other.
func ratios(a, b []float64) []float64 {
	out := make([]float64, min(len(a), len(b)))
	for i := range out {
		out[i] = a[i] / b[i]
	}
	return out
}

// number prints four digits or so.
func number(v float64) string {
	switch {
	case v >= 10000:
		s := fmt.Sprintf("%.0f", v)
		for i := len(s) - 3; i > 0; i -= 3 {
			s = s[:i] + "," + s[i:]
		}
		return s
	case v >= 1000:
		return fmt.Sprintf("%.0f", v)
	case v >= 100:
		return fmt.Sprintf("%.1f", v)
	case v >= 10:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// undecided tells that the noise of this run hides whether the target is met.
func (f *figure) undecided() bool {
	limit := f.Target.Below + f.Target.Above // one of them is 0
	return f.MedianLow < limit && limit < f.MedianHigh
}

// print shows the figures as a table by section.
func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %s. Medians, with quartiles.\n", r.Machine, r.Go)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	section := ""
	for _, f := range r.Figures {
		if f.Section != section {
			section = f.Section
			fmt.Fprintf(t, "\n%s\n", section)
		}
		spread, verdict := "", ""
		if f.Low != f.High {
			spread = number(f.Low) + " .. " + number(f.High)
		}
		if f.Target != nil {
			verdict = f.Target.String() + ": met"
			if !f.Target.Met {
				verdict = f.Target.String() + ": MISSED"
			}
			if f.undecided() {
				verdict += fmt.Sprintf(", within the noise (95 %%: %s .. %s)", number(f.MedianLow), number(f.MedianHigh))
			}
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%s\n", f.Name, number(f.Median)+" "+f.Unit, spread, verdict, f.Note)
	}
	t.Flush()
	for _, m := range r.Remarks {
		fmt.Fprintf(w, "\n%s\n", m)
	}
	missed, targets := r.missed()
	fmt.Fprintf(w, "\n%d of %d targets met in this run.", targets-len(missed), targets)
	if len(missed) > 0 {
		fmt.Fprintf(w, " MISSED: %s.", strings.Join(missed, "; "))
	}
	fmt.Fprintln(w)
}

// missed names the targets that were missed, of how many.
func (r *report) missed() (names []string, targets int) {
	for _, f := range r.Figures {
		if f.Target == nil {
			continue
		}
		targets++
		if !f.Target.Met {
			names = append(names, f.Section+", "+f.Name)
		}
	}
	return names, targets
}

func (r *report) write(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

func median(samples []float64) float64 {
	return quantile(slices.Sorted(slices.Values(samples)), 0.5)
}
