/*
 * A value and the two stores where it may be, for spin (docs/decisions/0004).
 *
 * One key. A writer puts and drops it in turn, a getter reads it: at the first listed store, and
 * then at the second. A store may stop and go on, the coordinator takes one that is silent off its
 * list, and lists it again when it has come back; a store may also join empty, or start anew. Each
 * question to a store is a step of its own.
 *
 *   P11  No get answers a value that is older than a drop or a put that went well before the get
 *        began.
 *
 * BUG_ are seeded bugs: each must be found.
 */
#ifndef EVENTS
#define EVENTS 4
#endif
#ifndef WRITES
#define WRITES 3
#endif
#define STORES 2

byte value[STORES]; /* its version at this store; 0: none */
bool alive[STORES] = true;
bool listed[STORES] = true;
bool away[STORES]; /* it was left out of a list that others were in: what it holds may be old */

byte version; /* of the last put */
byte floor;   /* what is older is gone: the last drop or put went well */
byte events;
byte busy = 2;

/* Asks a store that was listed when the operation began. Who is silent holds the operation up,
 * until the caller gives up: all that an operation without an answer may say is that it failed. */
#ifdef BUG_SILENT_COUNTS_AS_EMPTY
#define ANSWERS(s) true
#else
#define ANSWERS(s) alive[s]
#endif

inline look(s, found)
{
    atomic {
        if
        :: list[s] && !ANSWERS(s) -> failed = true
        :: list[s] && alive[s] && value[s] > 0 -> found = true
        :: else
        fi
    }
}

inline remove(s)
{
    atomic {
        if
        :: list[s] && !ANSWERS(s) -> failed = true
        :: list[s] && alive[s] -> value[s] = 0
        :: else
        fi
    }
}

inline store_at(s)
{
    atomic {
        if
        :: !alive[s] -> failed = true
        :: alive[s] && value[s] > 0 -> found0 = true /* Another was first. */
        :: else -> value[s] = version
        fi
    }
}

proctype Writer()
{
    bool list[STORES], failed, found0, found1;
    byte done;
    do
    :: done < WRITES ->
        done++;
        atomic {
            failed = false; found0 = false; found1 = false;
            list[0] = listed[0]; list[1] = listed[1]
        }
        if
        :: version < WRITES -> /* A put: is it there, where a get would look? */
            version++;
#ifndef BUG_PUT_ASKS_NOBODY
            look(0, found0);
            look(1, found1);
#endif
            if
            :: failed || found0 || found1 -> skip /* It stays as it is. */
            :: else ->
                if
                :: list[0] -> store_at(0)
                :: list[1] -> store_at(1) /* The only one, or the first is full. */
                :: else -> failed = true
                fi;
                atomic {
                    if
                    :: !failed && !found0 -> floor = version
                    :: else
                    fi
                }
            fi
        :: true -> /* A drop. */
            remove(0);
            remove(1);
            atomic {
                if
                :: !failed && (list[0] || list[1]) -> floor = version + 1
                :: else
                fi;
                version = (version < floor -> floor : version) /* What comes is newer. */
            }
        fi
    :: done == WRITES -> break
    od;
    busy--
}

proctype Getter()
{
    bool list[STORES];
    byte oldest, got, gets;
    do
    :: gets < 2 ->
        gets++;
        atomic {
            got = 0; oldest = floor;
            list[0] = listed[0]; list[1] = listed[1]
        }
        atomic {
            if
            :: list[0] && alive[0] -> got = value[0]
            :: else
            fi
        }
        atomic {
            if
            :: got == 0 && list[1] && alive[1] -> got = value[1]
            :: else
            fi
        }
        assert(got == 0 || got >= oldest) /* P11 */
    :: gets == 2 -> break
    od;
    busy--
}

proctype Events()
{
    byte s;
end:
    do
    :: busy > 0 && events < EVENTS ->
        events++;
        if
        :: s = 0
        :: s = 1
        fi;
        if
        :: atomic { alive[s] -> alive[s] = false }
        :: atomic { !alive[s] -> alive[s] = true }
        :: atomic { !alive[s] && listed[s] -> /* Silent for too long. */
            listed[s] = false;
            away[s] = listed[1 - s]
           }
        :: atomic { alive[s] && !listed[s] ->
#ifndef BUG_COMES_BACK_WITH_VALUES
            if
            :: away[s] -> value[s] = 0
            :: else
            fi;
#endif
            away[s] = false;
            listed[s] = true
           }
        :: atomic { !alive[s] -> alive[s] = true; value[s] = 0 } /* Started anew. */
        :: skip
        fi
    od
}

init
{
    atomic {
#ifdef JOINS /* The first store comes later, and is empty. */
        listed[0] = false;
#endif
        run Writer();
        run Getter();
        run Events()
    }
}
