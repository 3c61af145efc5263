// Command occupancy measures how long dials to one destination take, the more
// of the ephemeral ports towards it are taken, and draws pictures of it.
package main
