//! What can be wrong with a variant.

/// One way to be wrong; each breaks the promise named in the test's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    // The kernel computes something else than the definition.
    WrongScale,
    LastTileDropped,
    LastRowNotWritten,
    AddsToOutput,
    IgnoresStrides,
    SharesBatchEntry,
    NoRunningMaximum,
    HalfIsCoarse,
    PortableIsWrong,
    DependsOnThreads,
    NanLeaksToNeighbour,
    NanSwallowed,
    LseInBaseTwo,
    LseSaturates,
    // Kernel and definition agree, on something else than what is promised.
    WrongDefinition,
    CausalOffByOne,
    CausalIgnored,
    CausalNotPromised,
    NotConvex,
    ScoresKnowPositions,
    GroupsTiled,
    // The stream.
    StreamForgetsAToken,
    StreamMiscounts,
    StreamTakesAnything,
    // The edges.
    PanicsOnEmpty,
    NothingSeenIsNan,
    RefusesGroups,
    MoreThanPromised,
    VagueErrors,
    WritesBeforeChecking,
    // The registry entry.
    OtherName,
    PromisesNothing,
    CostGrowsOtherwise,
    SwallowsOptions,
    DefaultsDiffer,
    IgnoresTensors,
}

impl Fault {
    /// Whether the variant's own definition has the fault too, so that only the promise about it can tell.
    pub(crate) fn changes_the_definition(self) -> bool {
        use Fault::*;
        matches!(self, CausalOffByOne | CausalIgnored | NotConvex | ScoresKnowPositions | GroupsTiled)
    }
}
