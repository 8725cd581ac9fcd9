// Package twin proves that a guest cannot tell a migration of its VF from
// none. A random guest runs on two VFs of the model at once, each behind its
// engine: the twins. One of them stays where it is; the other is moved, again
// and again, at random points between any two accesses of the guest, to VFs
// that are new or had another tenant. After every operation all that the guest
// can observe is compared: what it reads, its memory, the frames on the wire
// and the interrupts.
//
// The silicon is any member of the family, with one to eight queue pairs, heads
// of rings that can be written, that stay, both or neither, and any PF. What a
// PF does by itself comes at random too, often while a twin moves: pings, its
// link down or up, trust given and taken, and resets. A run of many seeds fails
// unless it has met all of that (see all in twin_test.go).
//
// One seed decides everything: the guest's program, the silicon, when the twin
// moves and whereto. The program does not depend on what is moved, so that a
// seed fails or passes whatever is left out of a move. Time passes when the
// program says so, and with each move so much that no interval of interrupt
// moderation outlives it.
//
// # Differences that are allowed
//
//   - An interrupt more than the other twin had, on a vector in use, right
//     after a move; its handler finds nothing to do (see move.go).
//   - Such an interrupt of a relay at any time, with what it leaves in VTEICR
//     and VTEIMS.
//   - Frames that are in the packet buffer or on the wire during a move are
//     lost as on a wire: none are sent to the twins then, and none while there
//     are no descriptors for them and the queue would make them wait.
//   - Frames longer than what the guest last asked for are not sent to it: how
//     far a PF lets those through depends on what others had asked of it.
//   - From a PF that heeds the guest's messages no longer a move may lead to one
//     that does, until the guest has reset its VF, and so may one be refused
//     that needs what a VF that was trusted was granted.
//   - VFFRTIMER, a clock of the device, is not compared.
package twin
