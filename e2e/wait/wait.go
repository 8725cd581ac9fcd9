// Package wait waits for a condition of something that cannot tell of itself.
package wait

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// period is how often a condition is looked at.
const period = 50 * time.Millisecond

// Until waits until ok returns true, an error, or ctx ends; what names the
// condition in the error.
func Until(ctx context.Context, what string, ok func(context.Context) (bool, error)) error {
	t := time.NewTicker(period)
	defer t.Stop()
	for {
		done, err := ok(ctx)
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("timed out waiting for %s: %w", what, errors.Join(err, context.Cause(ctx)))
		case err != nil:
			return fmt.Errorf("waiting for %s: %w", what, err)
		case done:
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("timed out waiting for %s: %w", what, context.Cause(ctx))
		}
	}
}
