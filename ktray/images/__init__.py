"""Images for the stages: uint8 arrays by index, from a memmap or decoded on demand.

A data set's `load` lists its images (`Splits` of `Source`), `identity` hashes the content, `write` decodes all images once,
and `open_split` opens the result as `Images`. `decode` turns encoded bytes into pixels, for every kind of data set with files.

May import only the modules at the package's root. Start with `source.py` (the records), then `writing.py` and `reading.py`.
"""

from ktray.images.data_files import data_folder as data_folder
from ktray.images.data_files import download as download
from ktray.images.data_files import location_fields as location_fields
from ktray.images.data_files import with_absolute_path as with_absolute_path
from ktray.images.decoding import IDENTITY as IDENTITY
from ktray.images.decoding import MAX_PIXELS as MAX_PIXELS
from ktray.images.decoding import RANGE_REVISION as RANGE_REVISION
from ktray.images.decoding import REVISION as REVISION
from ktray.images.decoding import MaxPixels as MaxPixels
from ktray.images.decoding import PixelRange as PixelRange
from ktray.images.decoding import Properties as Properties
from ktray.images.decoding import decode as decode
from ktray.images.decoding import decode_mask as decode_mask
from ktray.images.decoding import decode_whole as decode_whole
from ktray.images.decoding import decoder as decoder
from ktray.images.decoding import fit as fit
from ktray.images.decoding import fit_boxes as fit_boxes
from ktray.images.decoding import fit_mask as fit_mask
from ktray.images.decoding import mask_size as mask_size
from ktray.images.decoding import pixels_and_properties as pixels_and_properties
from ktray.images.own_crop import OwnCrop as OwnCrop
from ktray.images.reading import open_split as open_split
from ktray.images.reading import splits_of as splits_of
from ktray.images.source import CROWD as CROWD
from ktray.images.source import DIFFICULT as DIFFICULT
from ktray.images.source import TRUNCATED as TRUNCATED
from ktray.images.source import VOID as VOID
from ktray.images.source import Images as Images
from ktray.images.source import Layout as Layout
from ktray.images.source import Recognised as Recognised
from ktray.images.source import Source as Source
from ktray.images.source import Splits as Splits
from ktray.images.source import Unreadable as Unreadable
from ktray.images.source import WholeImages as WholeImages
from ktray.images.source import held_out as held_out
from ktray.images.source import identity as identity
from ktray.images.source import split_rows as split_rows
from ktray.images.writing import write as write
from ktray.images.writing import write_sample as write_sample
